"""FFN SVD/PCA with residual bypass on top of GRC attention."""
