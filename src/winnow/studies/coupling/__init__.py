"""Cross-layer subspace coupling."""
