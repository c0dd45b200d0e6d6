"""Reading and writing results: sealed artefacts, tensor files, saved states of interrupted jobs, strict YAML and JSON."""
