"""The experiments of one paper each: a folder per study, whose module `study` defines a `base.Study`, with code that only this
study needs."""
