"""Linear algebra and rounding on tensors; nothing here knows of models, files or the workflow."""
