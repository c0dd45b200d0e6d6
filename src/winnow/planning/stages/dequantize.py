from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.planning.stages.base import HUGGING_FACE, Stage

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.planning.load import Load, Work

HEADER = 4000  # bytes a token of the vocabulary, of which gguf reads the text, the score and the type as arrays of their own
HELD = 7  # bytes a number of the largest tensor: as it is in the file, in float32 and in two bytes


class Dequantize(Stage):
    """The model of a GGUF file as safetensors."""

    libraries = (*HUGGING_FACE, "gguf")

    def spec(self, w: dict[str, str]) -> specs.Dequantize:
        model = self.plan.preset("models", w["model"])
        return {"source": model.source, "dtype": model.stored_dtype}

    def files(self, w: dict[str, str]) -> dict[str, str]:
        return self.plan.outside.of(*self.plan.local_model_files(w["model"]))

    def work(self, load: Load) -> list[Work]:
        memory = HELD * load.read / load.shape.unit + HEADER * load.shape.vocabulary
        return self.needed(load, int(self.plan.dequantized(load.label)), memory, load.shape.bytes)
