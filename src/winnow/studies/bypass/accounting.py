"""Stored parameters of a combined compression of attention and FFN under every way to count, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from winnow.models.architectures import TARGETS, Matrix

if TYPE_CHECKING:
    from winnow.io.records import Shaped
    from winnow.studies.bypass.found import Removed

LLAMA_8B = {  # config.json of meta-llama/Llama-3.1-8B
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
# Name of a way to count: (form of attention, form of the FFN, whether everything stored is counted)
CONVENTIONS: dict[str, tuple[str, str, bool]] = {
    "q, k, v share a basis; down alone": ("qkv", "down", True),
    "q, k, v share a basis; three SVDs": ("qkv", "own", True),
    "q, k, v share a basis; down, gate and up share one": ("qkv", "bypass", True),
    "the same and o, one shared rank": ("qkvo", "shared", True),
    "the same, no redundant numbers": ("qkvo_fixed", "shared_fixed", True),
    "three SVDs, no redundant numbers": ("qkvo_fixed", "own_fixed", True),
    "k / d, bases not counted": ("uncounted", "uncounted", False),
}


@dataclass(frozen=True)
class Ranks:
    """Ranks as shares of the width: of attention, of the FFN, and of the bypass in the FFN; 0 is dense."""

    attention: float
    ffn: float
    kept: float = 0.0


def llama_tensors(config: dict[str, Any]) -> dict[str, Shaped]:
    """{tensor: {shape}} of a Llama model, from its config alone."""
    d, f, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or d // config["num_attention_heads"]
    queries, values = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"q_proj": (queries, d), "k_proj": (values, d), "v_proj": (values, d), "o_proj": (d, queries)}
    ffn = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
    named: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocabulary, d), "model.norm": (d,)}
    if not config["tie_word_embeddings"]:
        named["lm_head"] = (vocabulary, d)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        named |= {f"{layer}.self_attn.{role}": shape for role, shape in shapes.items()}
        named |= {f"{layer}.mlp.{role}": shape for role, shape in ffn.items()}
        named |= {f"{layer}.{norm}": (d,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return {f"{name}.weight": {"shape": list(shape)} for name, shape in named.items()}


def parameters(tensors: Mapping[str, Mapping[str, Any]]) -> int:
    return sum(math.prod(record["shape"]) for record in tensors.values())


def dense(matrices: Iterable[Matrix]) -> int:
    """Numbers in the matrices, without biases."""
    return sum(m.shape[0] * m.shape[1] for m in matrices)


def stored(matrices: list[Matrix], form: str, ranks: Ranks) -> int:
    """Stored numbers of attention matrices (forms `qkv...`) or of FFN matrices (other forms) in a form, without biases;
    `uncounted` applies to both."""
    total = 0
    for part in _parts(matrices):
        if form == "uncounted":
            share = ranks.attention if part[0].role in TARGETS["attention"] else ranks.ffn + ranks.kept
            total += round((share or 1.0) * dense(part))
        else:
            total += _part(part, form, ranks)
    return total


def _parts(matrices: list[Matrix]) -> list[list[Matrix]]:
    """[q, k, v], [o], [gate, up] and [down] of every layer and expert, also if fused."""
    found: dict[tuple[int, int | None, str], list[Matrix]] = {}
    for m in matrices:
        name = next((t for t in ("qkv", "gate_up") if m.role in TARGETS[t]), m.role)
        found.setdefault((m.layer, m.expert, name), []).append(m)
    return list(found.values())


def _part(part: list[Matrix], form: str, ranks: Ranks) -> int:
    outs, n = [m.shape[0] for m in part], part[0].shape[1]
    role, m, whole = part[0].role, sum(outs), min(sum(outs), n)
    attention = role in TARGETS["attention"]
    share = ranks.attention if attention else ranks.ffn
    if not share:
        return dense(part)
    k, kept = max(1, round(share * whole)), [round(ranks.kept * min(one.shape)) for one in part]
    fixed = form.endswith("_fixed")
    if attention:
        if role == "o_proj" and form == "qkv":
            return dense(part)
        return k * (m + n - (k if fixed else 0))
    if role == "down_proj" or form.startswith("own"):
        sizes = [min(max(1, round(share * min(one.shape))) + r, *one.shape) for one, r in zip(part, kept, strict=True)]
        return sum(size * (sum(one.shape) - (size if fixed else 0)) for one, size in zip(part, sizes, strict=True))
    if form == "down":
        return dense(part)
    if form == "bypass":  # a bypass for every matrix, the remainder in the shared basis
        return k * (m + n) + sum(r * sum(one.shape) for one, r in zip(part, kept, strict=True))
    k = min(whole, k + kept[0])
    return k * (m + n - (k if fixed else 0))


def removed(matrices: list[Matrix], total: int, ranks: Ranks) -> list[Removed]:
    """Removed parameters by every convention, in % of all `total` parameters and of those in `matrices`."""
    attention = [m for m in matrices if m.role in TARGETS["attention"]]
    ffn = [m for m in matrices if m.role in TARGETS["ffn"]]
    whole = dense(matrices)
    rows: list[Removed] = []
    for name, (of_attention, of_ffn, counted) in CONVENTIONS.items():
        gone = whole - stored(attention, of_attention, ranks) - stored(ffn, of_ffn, ranks)
        of_all, of_blocks = 100 * gone / total, 100 * gone / whole
        row: Removed = {"convention": name, "counted": counted, "removed_numbers": gone, "of_all": of_all, "of_blocks": of_blocks}
        rows.append(row)
    return rows


def reachable(rows: list[Removed]) -> tuple[float, float]:
    """(least, most) removed under any convention that counts everything stored, in % of either total."""
    values = [row[key] for row in rows if row["counted"] for key in ("of_all", "of_blocks")]
    return min(values), max(values)
