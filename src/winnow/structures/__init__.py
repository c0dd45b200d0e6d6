"""What is stored instead of matrices: one kind of structure per file, registered by `base.STRUCTURES`."""
