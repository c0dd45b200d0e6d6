"""Fits of a method to every group of matrices, and the predicted loss of every size."""
