"""From the configuration to what is run: presets, labels, cells, stages, fingerprints, forecasts. Imports no torch."""
