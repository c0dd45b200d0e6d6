"""The plug-in for vLLM: `vllm serve <checkpoint>` runs a compressed checkpoint as it is stored.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes.
"""

import logging
from importlib import import_module

from winnow.errors import first_line

log = logging.getLogger(__name__)


def register() -> None:
    """Registers the quantization method `winnow` with vLLM. It can be called repeatedly. With a vLLM that has other modules, it
    logs a warning: models that are not compressed must not fail for it."""
    try:
        import_module("winnow.engines.vllm.config")
    except ImportError as error:
        log.warning(
            "winnow's plug-in cannot be loaded, so vLLM runs no compressed checkpoint: %s; install vLLM 0.32", first_line(error)
        )
