"""Heavy hitters and a split FFN."""
