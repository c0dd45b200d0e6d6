"""What follows compression to win back quality, at the same bytes."""
