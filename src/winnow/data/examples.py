"""Rows of a classification task as token ids, for a classifier and for calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from winnow.data.tokens import check_different, check_known
from winnow.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import torch


@dataclass(frozen=True)
class Examples:
    """Rows as token ids of varying length, with special tokens; `types`: token type ids of the texts of a pair."""

    ids: list[list[int]]
    types: list[list[int]]
    labels: np.ndarray  # (rows,)

    def batch(self, rows: Sequence[int], pad: int, types: bool, device: str) -> dict[str, torch.Tensor]:
        """The model inputs for some rows, padded at the end to the longest; `types`: whether the model has token type ids."""
        import torch

        width = max(len(self.ids[row]) for row in rows)
        filled = {"input_ids": (self.ids, pad), "token_type_ids": (self.types, 0)}
        found = {
            name: torch.tensor([values[row] + [fill] * (width - len(values[row])) for row in rows], device=device)
            for name, (values, fill) in filled.items()
            if types or name == "input_ids"
        }
        lengths = torch.tensor([[len(self.ids[row])] for row in rows], device=device)
        return {**found, "attention_mask": (torch.arange(width, device=device)[None] < lengths).long()}

    def windows(self, count: int, seed: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, types) (count, longest) int32 of rows sampled without replacement with `seed`, in order, padded with `pad`."""
        if len(self.ids) < count:
            raise InputError(f"there are {len(self.ids)} train rows, but {count} windows are requested; lower `windows`")
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self.ids))[:count])
        width = max(len(self.ids[row]) for row in chosen)
        ids, types = (np.full((count, width), fill, dtype=np.int32) for fill in (pad, 0))
        for place, row in enumerate(chosen):
            ids[place, : len(self.ids[row])], types[place, : len(self.types[row])] = self.ids[row], self.types[row]
        return ids, types


def encode_rows(tokenizer: Any, table: pd.DataFrame, length: int) -> Examples:
    """The rows tokenized for a classifier, truncated to `length` tokens (the longer text of a pair first). Raises InputError for
    a row without tokens, for mostly unknown tokens, and if all rows have the same tokens."""
    texts = [table[name].tolist() for name in ("text", "pair") if name in table]
    found = tokenizer(*texts, truncation=True, max_length=length, padding=False, return_token_type_ids=True)
    empty = next((i for i, ids in enumerate(found["input_ids"]) if not ids), None)
    if empty is not None:
        raise InputError(f"row {empty}: the tokenizer outputs no token for {table['text'][empty][:60]!r}")
    check_known(tokenizer, found["input_ids"], tokenizer(*[[""]] * len(texts)).input_ids[0])
    check_different(found["input_ids"], "rows")
    return Examples(found["input_ids"], found["token_type_ids"], table["label"].to_numpy())


def takes_types(config: Any) -> bool:
    """Whether a model has an input of token type ids for the texts of a pair."""
    return (getattr(config, "type_vocab_size", 0) or 0) > 1


def padding_of(config: Any) -> int:
    """The padding id. Raises InputError if the config has none, or one without an embedding: decoders find the end of a text by
    it."""
    if config.pad_token_id is None:
        raise InputError(f"{config.name_or_path}: config.json has no pad_token_id, which padding of batches needs; set it there")
    if not 0 <= config.pad_token_id < config.get_text_config().vocab_size:
        raise InputError(f"{config.name_or_path}: pad_token_id in config.json is {config.pad_token_id}, which is not a token id")
    return int(config.pad_token_id)
