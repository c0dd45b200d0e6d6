"""How much of a model FFSplit removes under every way to count, from the config alone, without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from winnow.models.architectures import blocks_of, ffn_groups, matrices_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnow.io.records import Shaped
    from winnow.structures.base import Structure
    from winnow.studies.ffsplit.found import Size

# The paper's models, by their published configs.
_BERT = {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_OPT = {"model_type": "opt", "vocab_size": 50272, "hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16384}
PUBLISHED: dict[str, dict[str, Any]] = {
    "BERT-base": {**_BERT, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "BERT-large": {**_BERT, **_LARGE},
    "OPT-6.7B": {**_OPT, "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048},
}


def published(name: str) -> PreTrainedModel:
    """The model of a published config, without weights."""
    from transformers import AutoConfig, AutoModel

    config = dict(PUBLISHED[name])
    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.for_model(config.pop("model_type"), **config))


def counted(model: Any, structure: Structure, share: float) -> Size:
    """Parameters of a model on `meta`: in total, without embeddings (of tokens, positions and types, and a head), and only of its
    blocks; those of its FFNs; and the share of each that a structure at `share` of its whole rank removes."""
    own = {name: parameter for name, parameter in model.named_parameters()}  # tied ones once
    tensors: dict[str, Shaped] = {name: {"shape": list(parameter.shape)} for name, parameter in own.items()}
    kind = model.config.get_text_config().model_type
    groups = ffn_groups([m for m in matrices_of(kind, tensors) if m.expert is None])
    dense = sum(m.shape[0] * m.shape[1] + m.bias * m.shape[0] for group in groups for m in group)
    sizes = [max(1, round(share * structure.whole(group))) for group in groups]
    stored = sum(structure.numbers(group, size, {}) for group, size in zip(groups, sizes, strict=True))
    tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tables |= {id(p) for p in head.parameters()} if head is not None else set()
    inside = tuple(f"{block}." for block in blocks_of(kind, tensors).values())
    whole = sum(p.numel() for p in own.values())
    embeddings = sum(p.numel() for p in own.values() if id(p) in tables)
    blocks = sum(p.numel() for name, p in own.items() if name.startswith(inside))
    numbers = {"whole": whole, "without_embeddings": whole - embeddings, "blocks": blocks}
    return {
        "whole": whole,
        "without_embeddings": whole - embeddings,
        "blocks": blocks,
        "ffn": dense,
        "ffn_stored": stored,
        "ffn_kept": stored / dense,
        "saved": {name: 100 * (dense - stored) / count for name, count in numbers.items()},
        "ffn_share": {name: 100 * dense / count for name, count in numbers.items()},
    }
