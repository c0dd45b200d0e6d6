"""The error that a fit minimises: one kind of metric per file, registered by `base.METRICS`."""
