"""Measurements of the study of bypasses on weights: bytes by formula, numbers of GRC, and identities with their residuals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from winnow.factors.spectra import effective_ranks
from winnow.io.progress import every
from winnow.metrics.gram import Gram
from winnow.metrics.weights import Weights
from winnow.models.architectures import TARGETS, Matrix, moments_file
from winnow.models.files import number_bytes, tensor_bytes
from winnow.structures.base import Problem, Structure
from winnow.structures.bypass import Bypass
from winnow.structures.low_rank import LowRank
from winnow.studies.bypass.accounting import Ranks, stored
from winnow.studies.bypass.grc import basis, projected_error, sink_gain

if TYPE_CHECKING:
    from torch import Tensor

    from winnow.io.artifacts import Bundle
    from winnow.models.files import ModelFiles
    from winnow.studies.bypass.found import Grc


def formula_bytes(files: ModelFiles, ranks: Ranks) -> int | None:
    """Bytes of q, k, v (shared basis) and the FFN (shared basis of gate and up, SVD of down, `kept` directions), as far as
    `ranks` compresses them, including biases. None for mixtures, whose experts may stay dense."""
    if any(m.expert is not None for m in files.matrices):
        return None
    qkv = [m for m in files.matrices if m.role in TARGETS["qkv"] and ranks.attention]
    ffn = [m for m in files.matrices if m.role in TARGETS["ffn"] and ranks.ffn]
    unit = number_bytes(files.tensors[f"{files.matrices[0].module}.weight"]["dtype"])
    biases = sum(tensor_bytes(files.tensors[f"{m.module}.bias"]) for m in qkv + ffn if m.bias)
    return (stored(qkv, "qkv", ranks) + stored(ffn, "bypass", ranks)) * unit + biases


def _stacks(files: ModelFiles, target: str, matrices: Sequence[Matrix]) -> list[Tensor]:
    """The matrices of a target stacked along their outputs (sum m, n), for every layer, without experts."""
    import torch

    found: dict[int, list[Matrix]] = {}
    for m in (m for m in matrices if m.role in TARGETS[target] and m.expert is None):
        found.setdefault(m.layer, []).append(m)
    return [torch.cat([files.weight(m) for m in group]) for group in found.values()]


def grc_numbers(files: ModelFiles, matrices: Sequence[Matrix] | None = None) -> Grc:
    """`k95_qkv` and `k95_gate_up` (shares of the width, means over layers; None without such matrices), `sinks` (gain in %,
    mean over layers), and `full`, the largest change of a weight at k = d (% of the largest weight). `matrices`: all by
    default."""
    import torch

    matrices = files.matrices if matrices is None else matrices

    found: Any = {}
    for target in ("qkv", "gate_up"):
        shares = [effective_ranks(torch.linalg.svdvals(s).numpy())["k95"] / s.shape[1] for s in _stacks(files, target, matrices)]
        found[f"k95_{target}"] = sum(shares) / len(shares) if shares else None
    stacks = _stacks(files, "qkv", matrices)
    found["sinks"] = sum(sink_gain(s, s.shape[1] // 4) for s in stacks) / len(stacks)
    bases = [basis(s) for s in stacks]
    found["full"] = max(float(100 * ((s @ p) @ p.T - s).abs().max() / s.abs().max()) for s, p in zip(stacks, bases, strict=True))
    return found


def identities(files: ModelFiles, moments: Bundle, kept: float, matrices: Sequence[Matrix] | None = None) -> dict[str, float]:
    """Largest residuals over layers and matrices (all by default), relative to squared norms, of exact identities."""
    import torch

    matrices = files.matrices if matrices is None else matrices

    worst: dict[str, float] = {}

    def seen(name: str, residual: float) -> None:
        worst[name] = max(worst.get(name, 0.0), residual)

    ffn = [m for m in matrices if m.role in TARGETS["ffn"] and m.expert is None]
    for m in every(ffn, "matrices"):
        weight = files.weight(m)
        gram = moments.tensors(moments_file(m.layer))[f"{m.site}.gram"].double()
        for kind, columns in (("weights", torch.ones(m.shape[1], dtype=torch.float64)), ("outputs", gram)):
            metric = Weights(Weights.Options(kind="weights")) if kind == "weights" else Gram(Gram.Options(kind="gram", ridge=0.0))
            problem = Problem([m], {m.name: weight}, {m.name: {"gram": gram}}, metric)
            k, r = min(m.shape) // 2, max(1, round(kept * min(m.shape)))
            bypass = Bypass(
                Bypass.Options.model_validate({"kind": "bypass", "kept": r})
            )  # the remainder by low_rank, in the same metric
            maps = [_map(problem, LowRank(LowRank.Options(kind="low_rank")), k + r), _map(problem, bypass, k)]
            error, other, whole = (_squared(weight - one, columns) for one in (*maps, torch.zeros_like(weight)))
            name = f"r kept apart and an SVD of the rest = rank r + k, error of the {kind}"
            seen(name, abs(error - other) / whole)
            if kind == "weights":
                seen("the same, as maps", float((maps[0] - maps[1]).norm() / weight.norm()))
                tail = torch.linalg.svdvals(weight)[k + r :].square().sum()
                seen("||W - W_k||^2 = sum of the squared singular values beyond k", abs(error - float(tail)) / whole)
    for target, k_share in (("gate_up", 0.5), ("qkv", 0.25)):
        for stack in _stacks(files, target, matrices):
            k = max(1, round(k_share * stack.shape[1]))
            values = torch.linalg.svdvals(stack).square()
            best, found = float(values[k:].sum() / values.sum()), projected_error(stack, basis(stack)[:, :k])
            seen("shared basis of q, k, v and of gate, up = truncated SVD of the stack", abs(best - found))
            if target == "qkv":
                powered = projected_error(stack, basis(stack, 4)[:, :k])
                seen("the basis of K^4 (three power iterations) leaves the error of that of K", abs(powered - found))
    return worst


def _map(problem: Problem, structure: Structure, size: int) -> Tensor:
    """The map (m, n) of size `size` of `low_rank`, or of a bypass with it."""
    tensors, (name,) = structure.fit(problem, size).tensors, problem.weights
    if isinstance(structure, LowRank):
        return tensors["left"][:, :size] @ tensors["right"][:size]
    kept = tensors[f"{name}.kept.left"] @ tensors[f"{name}.kept.right"]
    return kept + tensors["rest.left"][:, :size] @ tensors["rest.right"][:size]


def _squared(rest: Tensor, columns: Tensor) -> float:
    return float(((rest * columns if columns.dim() == 1 else rest @ columns) * rest).sum())
