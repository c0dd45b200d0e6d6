"""Models as files: architectures, names of tensors, classes, what config.json may say, retrieval."""
