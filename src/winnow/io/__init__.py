"""Reading and writing results: sealed artefacts, tensor files, work that can go on after a stop, strict YAML and JSON."""
