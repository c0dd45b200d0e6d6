"""The one exception that means "the input is wrong": shown to the user as a single line, without a traceback."""

import sys


class InputError(ValueError):
    """What is wrong, where (file, key or layer) and what to do, in one line."""


def absent(library: str) -> str:
    """What is said where a library that only some stages and commands use is not installed."""
    return f"needs {library}, which is not installed; in winnow's checkout, `pip install '.[workflow]'` installs all that it uses"


def missing(error: BaseException) -> str | None:
    """The library that an import did not find. None for other errors, and for a module that a library was to have."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    library = (name or "").partition(".")[0]
    return library if library and sys.modules.get(library) is None else None


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
