"""Which error a fit minimises: a kind of metric per file, registered by `base.METRICS`."""
