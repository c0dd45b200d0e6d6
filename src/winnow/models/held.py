"""A model of transformers in memory, with the interface of model files."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from winnow.errors import InputError
from winnow.io.records import ModelManifest, TensorRecord
from winnow.io.tensors import NAMES
from winnow.models.architectures import ARCHITECTURES
from winnow.models.classes import is_causal
from winnow.models.files import ModelFiles, tensor_bytes

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SHORT = {f"torch.{long}": short for short, long in NAMES.items()}


class HeldModel(ModelFiles):
    """The tensors of a loaded model under their canonical names, in the dtype in which it was loaded."""

    def __init__(self, model: PreTrainedModel):
        """Raises InputError for a mixture of experts, whose experts transformers keeps in one tensor, for a compressed or
        quantised model, and for a family that is not supported."""
        family = ARCHITECTURES.get(model.config.model_type)
        if family is not None and family.experts:
            raise InputError(f"{type(model).__name__} is a mixture of experts; give the directory of the model instead")
        if getattr(model.config, "quantization_config", None) is not None:
            raise InputError(f"{type(model).__name__} is compressed or quantised already; give the dense model")
        tied = dict(model.all_tied_weights_keys)
        self.held: dict[str, Tensor] = {n: t for n, t in model.state_dict().items() if n not in tied}
        tensors: dict[str, TensorRecord] = {
            name: {"file": "", "key": name, "dtype": SHORT[str(t.dtype)], "shape": list(t.shape)} for name, t in self.held.items()
        }
        self.model = model
        manifest: Any = {
            "directory": "",
            "model_type": model.config.model_type,
            "class": type(model).__name__,
            "causal": is_causal(model.config),
            "max_length": getattr(model.config.get_text_config(), "max_position_embeddings", None),
            "files": {},
            "tied": tied,
            "tensors": tensors,
            "bytes": sum(tensor_bytes(t) for t in tensors.values()),
        }
        found: ModelManifest = manifest
        super().__init__(found)

    def tensor(self, name: str) -> Tensor:
        return self.held[name].detach().cpu()

    @cached_property
    def _described(self) -> TemporaryDirectory:
        """A folder with the model's configuration, which a checkpoint adds to."""
        folder = TemporaryDirectory(prefix="winnow-")
        self.model.config.save_pretrained(folder.name)
        return folder

    def verify(self) -> Path:
        return Path(self._described.name)
