"""Statistics of a model on a calibration text: of activations and gradients, and clusters of channels."""
