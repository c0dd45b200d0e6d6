"""Compressed checkpoints in inference engines: one package per engine, which alone imports the engine."""
