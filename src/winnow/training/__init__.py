"""Training on the labels of a task."""
