"""Fitting the method of a cell to every group of matrices, and the loss that every size is predicted to have."""
