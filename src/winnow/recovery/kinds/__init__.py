"""One kind of recovery per file, registered by `winnow.recovery.base.RECOVERIES`."""
