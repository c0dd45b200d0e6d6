"""The experiments of one paper each: a folder per study, whose `study` defines a `base.Study`; beside it is what no other
study needs."""
