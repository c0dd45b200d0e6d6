"""Measurements of a model, dense or compressed: perplexity, accuracy, classification, latency."""
