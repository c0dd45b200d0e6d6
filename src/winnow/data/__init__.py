"""Texts, tokens, rows of classification tasks, and tasks of lm-eval."""
