"""From a budget of bytes to a size for every group of matrices."""
