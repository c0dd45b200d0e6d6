"""Compressed checkpoints: layouts, writing, loading by transformers, streaming, cards, export as a dense model."""
