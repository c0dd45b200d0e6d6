"""The plug-in for vLLM: `vllm serve <checkpoint>` runs a compressed checkpoint as it is stored.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes.
"""

from importlib import import_module


def register() -> None:
    """Registers the quantization method `winnow` with vLLM. It can be called repeatedly."""
    import_module("winnow.engines.vllm.config")
