"""winnow: compress the feed-forward and attention layers of transformer language models, and measure what it costs.

Importing the package is enough to load a winnow checkpoint with `AutoModelForCausalLM.from_pretrained`.
"""

from importlib import import_module

from wrapt import register_post_import_hook

# When transformers' registry of quantizers is imported, and not before: planning a workflow imports this package too, and
# must not pay for transformers and torch.
register_post_import_hook(lambda _: import_module("winnow.checkpoint.hf"), "transformers.quantizers.auto")
register_post_import_hook(lambda _: import_module("winnow.checkpoint.lora"), "peft")
