"""Names of tensors: from those of a file to those of the transformers model."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from winnow.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def canonical_names(model: PreTrainedModel) -> Callable[[str], str | None]:
    """A function from a tensor's name in a file to its name in the model, by transformers' own renamings and prefix.

    It gives None for names that the model class declares as ignored, and raises InputError for unknown ones.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    expected = set(model.state_dict())
    prefix = model.base_model_prefix + "."
    ignored = [*(model._keys_to_ignore_on_load_unexpected or []), r"rotary_emb\.inv_freq$", r"\.masked_bias$"]
    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]

    def name_of(key: str) -> str | None:
        renamed = key
        for renaming in renamings:
            renamed = renaming.rename_source_key(renamed)[0]
        for name in (key, renamed, prefix + renamed, renamed.removeprefix(prefix)):
            if name in expected:
                return name
        if any(re.search(pattern, key) for pattern in ignored):
            return None
        raise InputError(
            f"unexpected tensor {key}: {type(model).__name__} has none of that name; the file is damaged or was renamed"
        )

    return name_of
