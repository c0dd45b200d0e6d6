"""What the functions are given: a model as a directory or in memory, and windows of token ids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from winnow.checkpoint.loading import load_model
from winnow.data.tokens import check_length
from winnow.errors import InputError
from winnow.models.files import ModelFiles
from winnow.models.gguf import dequantize_model, gguf_file
from winnow.models.held import HeldModel
from winnow.models.retrieve import describe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DequantizedFiles(ModelFiles):
    """The model of a GGUF file as safetensors in a temporary folder, which lives as long as this."""

    def __init__(self, file: Path):
        self.folder = TemporaryDirectory(prefix="winnow-")
        dequantize_model(file, Path(self.folder.name))
        super().__init__(describe(Path(self.folder.name)))


def loaded(model: str | Path | PreTrainedModel, dtype: str, device: str) -> tuple[ModelFiles, PreTrainedModel]:
    """The tensors of a model, and the model that runs: of a directory or a GGUF file in `dtype` on `device`, or the given one as
    it is."""
    if isinstance(model, str | Path):
        files = DequantizedFiles(file) if (file := gguf_file(model)) else ModelFiles(describe(Path(model)))
        return files, load_model(files.verify(), dtype, device)
    return HeldModel(model), model


def checked(windows: Any, model: PreTrainedModel) -> Tensor:
    """Windows (windows, length) as int64. Raises InputError if they are not integers of that shape, longer than the model's
    positions, or have ids that the model has no embedding for."""
    ids = torch.as_tensor(windows)
    if ids.dim() != 2 or ids.is_floating_point() or not len(ids) or ids.shape[1] < 2:
        raise InputError(
            f"windows: {ids.dtype} of shape {tuple(ids.shape)}; give token ids, integers (windows, length), of at least 2 tokens"
        )
    check_length(ids.shape[1], getattr(model.config.get_text_config(), "max_position_embeddings", None))
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if int(ids.max()) >= rows or int(ids.min()) < 0:
        wrong = int(ids.max()) if int(ids.max()) >= rows else int(ids.min())
        raise InputError(f"windows: there is no token {wrong} in a model of {rows} embeddings; use the model's own tokenizer")
    return ids.long()


@contextmanager
def as_it_was(model: PreTrainedModel) -> Iterator[None]:
    """Within, the model is in evaluation mode; afterwards as it was, also what its parameters need gradients for."""
    training, needed = model.training, [p.requires_grad for p in model.parameters()]
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for parameter, need in zip(model.parameters(), needed, strict=True):
            parameter.requires_grad_(need)
