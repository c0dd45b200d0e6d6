"""Recovery of quality after compression, at the same bytes."""
