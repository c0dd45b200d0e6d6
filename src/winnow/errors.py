"""The one exception that means "the input is wrong": shown to the user as a single line, without a traceback."""


class InputError(ValueError):
    """What is wrong, where (file, key or layer) and what to do, in one line."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
