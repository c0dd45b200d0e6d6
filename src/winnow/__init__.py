"""winnow: compress the feed-forward and attention layers of transformer language models, and measure what it costs.

Importing the package is enough to load a winnow checkpoint with `AutoModelForCausalLM.from_pretrained`. `winnow.compress` and
`winnow.evaluate` are the functions of `winnow.api`. `winnow.for_inference` prepares a loaded checkpoint to be run.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from winnow.api import Compressed, Report, calibration_windows, compress, evaluate, evaluation_windows
    from winnow.numerics.inference import for_inference

__all__ = ["Compressed", "Report", "calibration_windows", "compress", "evaluate", "evaluation_windows", "for_inference"]

# When transformers' registry of quantizers is imported, and not before: planning a workflow imports this package too, and
# must not pay for transformers and torch.
register_post_import_hook(lambda _: import_module("winnow.checkpoint.hf"), "transformers.quantizers.auto")
register_post_import_hook(lambda _: import_module("winnow.checkpoint.lora"), "peft")


def __getattr__(name: str) -> Any:
    """The public functions, imported when they are first used: they need torch and transformers."""
    if name in __all__:
        return getattr(import_module("winnow.numerics.inference" if name == "for_inference" else "winnow.api"), name)
    raise AttributeError(f"module 'winnow' has no attribute {name!r}")
