"""Exports for inference engines."""
