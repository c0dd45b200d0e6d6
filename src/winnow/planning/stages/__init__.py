"""What every stage depends on: a file per stage, of the name of its rule and its script, registered by `base.STAGES`."""
