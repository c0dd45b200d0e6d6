"""Linear recoverability."""
