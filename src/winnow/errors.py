"""The one exception that means "the input is wrong": shown to the user as a single line, without a traceback."""


class InputError(ValueError):
    """What is wrong, where (file, key or layer) and what to do, in one line."""
