"""What is stored instead of matrices: a kind of structure per file, registered by `base.STRUCTURES`."""
