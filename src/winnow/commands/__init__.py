"""Commands outside of a workflow run, one file each."""
