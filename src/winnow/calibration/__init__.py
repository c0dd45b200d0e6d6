"""What a calibration text tells of a model: statistics of activations and gradients, clusters of channels."""
