from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.planning.stages.base import HUGGING_FACE, Stage

if TYPE_CHECKING:
    from winnow.io import specs

DEMO_MODEL: specs.Demo = {  # the recipe of resources/models/demo
    "vocab_size": 1024,
    "shape": {
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    "training": {"steps": 800, "batch": 16, "length": 256, "rate": 0.003, "decay": 0.5, "seed": 0},
}


class DemoModel(Stage):
    """The model of the demo."""

    libraries = HUGGING_FACE

    def spec(self, w: dict[str, str]) -> specs.Demo:
        return DEMO_MODEL
