"""Per-cluster column SVD, activation weighting, LoRA."""
