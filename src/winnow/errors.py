"""The exception for wrong input, shown to the user as a single line without a traceback."""

import sys


class InputError(ValueError):
    """What is wrong, where (file, key or layer) and what to do, in one line."""


EXTRAS = dict.fromkeys(("compressed_tensors", "gguf"), "engines")  # the extra with a library that is not in `workflow`


def absent(library: str) -> str:
    """The message for a missing library that only some stages and commands use."""
    extra = EXTRAS.get(library, "workflow")
    return f"needs {library}, which is not installed; run `pip install '.[{extra}]'` in winnow's checkout"


def missing(error: BaseException) -> str | None:
    """The library that an import did not find. None for other errors, and for a missing module within a library."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    library = (name or "").partition(".")[0]
    return library if library and sys.modules.get(library) is None else None


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
