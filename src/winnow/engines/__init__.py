"""Compressed checkpoints in inference engines: a package per engine or format, which alone imports what it needs; and times."""
