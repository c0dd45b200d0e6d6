"""Sections that several maps share: block coordinate descent on their energy, in float64.

A section is an orthonormal basis (d, k). Map A_l (m, n) is kept as Q Q^T A_l P P^T with P = S_{inputs[l]} and Q = S_{outputs[l]}
(as A_l P P^T without outputs), and its error is ||A_l||^2 - ||Q^T A_l P||^2. With projectors onto the anchors S^a,

    E = sum_l error_l + (strength / 2) sum_s ||S_s S_s^T - S^a_s S^a_s^T||^2
      = sum_l error_l + strength sum_s (k - ||S_s^T S^a_s||^2).

For a section that is not on both sides of one map, E is linear in its projector, a constant - tr(S^T G S): given the others, the
optimal section is spanned by the leading eigenvectors of G = F F^T, F = `Coupling.seen`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from winnow.numerics.linalg import EPSILON, left_singular, regularized

Sections = list[Tensor]  # (d, k) each, by number
RIDGE = 1e-10  # of a metric that is inverted, as a share of its mean diagonal


@dataclass(frozen=True)
class Coupling:
    """`maps` (L, m, n), and the numbers of every map's sections, counted from 0 without gaps."""

    maps: Tensor
    inputs: list[int]
    outputs: list[int]  # empty: maps are projected on their inputs only

    @property
    def count(self) -> int:
        return 1 + max(self.inputs + self.outputs)

    def readers(self, section: int) -> list[int]:
        """The maps that have the section as P."""
        return [layer for layer, own in enumerate(self.inputs) if own == section]

    def writers(self, section: int) -> list[int]:
        """The maps that have the section as Q."""
        return [layer for layer, own in enumerate(self.outputs) if own == section]

    def core(self, layer: int, sections: Sections) -> Tensor:
        """Q^T A P (k, k), or A P (m, k)."""
        core = self.maps[layer] @ sections[self.inputs[layer]]
        return sections[self.outputs[layer]].T @ core if self.outputs else core

    def errors(self, sections: Sections) -> Tensor:
        """Squared error of every map (L,)."""
        kept = [self.core(layer, sections).square().sum() for layer in range(len(self.maps))]
        return self.maps.square().sum((1, 2)) - torch.stack(kept)

    def energy(self, sections: Sections, anchors: Sections, strength: float) -> float:
        pull = sum(own.shape[1] - float((own.T @ anchor).square().sum()) for own, anchor in zip(sections, anchors, strict=True))
        return float(self.errors(sections).sum()) + strength * pull

    def seen(self, section: int, sections: Sections | None = None) -> Tensor:
        """F (d, j): A^T Q of the section's readers next to A P of its writers; without `sections`, A^T next to A."""
        parts = [self.maps[i].T for i in self.readers(section)] + [self.maps[i] for i in self.writers(section)]
        if sections and self.outputs:
            others = [self.outputs[i] for i in self.readers(section)] + [self.inputs[i] for i in self.writers(section)]
            parts = [part @ sections[other] for part, other in zip(parts, others, strict=True)]
        return torch.cat(parts, dim=1)

    def shift(self, section: int) -> float:
        """c that makes tr(X A X A^T) + (c / 2) ||X||^2, summed over the maps with the section on both sides, convex in the
        projector X; 0 if there are none. The added term is constant for projectors of one rank."""
        loops = set(self.readers(section)) & set(self.writers(section))
        return 2 * sum(float(torch.linalg.matrix_norm(self.maps[i], 2)) ** 2 for i in sorted(loops))

    def nested(self, width: int) -> Sections:
        """Sections whose first k columns are sections of size k: leading directions of `seen` without sections."""
        return [leading(self.seen(s), width) for s in range(self.count)]

    def nested_error(self, sections: Sections) -> Tensor:
        """Sum of the maps' squared errors with the first k columns of `sections`, for k = 0..width."""
        shells = sections[0].new_zeros(sections[0].shape[1])
        rest = sections[0].new_zeros(())
        for layer, a in enumerate(self.maps):
            squared = self.core(layer, sections).square()
            # The k-th shell is what size k adds: the k-th column, and the k-th row if there are outputs.
            shells += (squared.triu() + squared.tril(-1).T).sum(0) if self.outputs else squared.sum(0)
            rest += (a.square().sum() - squared.sum()).clamp(min=0)
        return torch.cat([shells.flip(0).cumsum(0).flip(0), shells.new_zeros(1)]) + rest


def numbering(layers: int, together: int, chained: bool) -> tuple[list[int], list[int]]:
    """The numbers of the sections of every layer's inputs and outputs; `together` consecutive places share one. Chained sections
    are those of the places between layers, 0..L; otherwise all inputs are numbered, then all outputs."""
    inputs, after = ([(layer + step) // together for layer in range(layers)] for step in (0, 1))
    return inputs, after if chained else [1 + inputs[-1] + section for section in inputs]


def roots(columns: Tensor, precision: float, what: str) -> tuple[Tensor, Tensor]:
    """C^{1/2} and C^{-1/2} of a metric, diagonal (n,) or full (n, n), made invertible by a ridge; `what` names it in errors."""
    columns = regularized(columns, max(RIDGE, precision), what)
    if columns.dim() == 1:
        return columns.sqrt(), columns.rsqrt()
    values, vectors = torch.linalg.eigh(columns)
    scale = values.clamp(min=float(len(values) * EPSILON * values[-1])).sqrt()
    return (vectors * scale) @ vectors.T, (vectors / scale) @ vectors.T


def times(left: Tensor, root: Tensor) -> Tensor:
    """`left` (m, n) times a root, diagonal (n,) or full (n, n)."""
    return left * root if root.dim() == 1 else left @ root


def right_factor(section: Tensor, inverse: Tensor | None) -> tuple[Tensor, Tensor]:
    """(Z (n, k), B (k, k)) with C^{-1/2} P = Z B^T. Z is orthonormal, which keeps rounding errors of the stored factors small
    although C^{-1/2} may be large. With the metric I, Z is the section itself."""
    if inverse is None:
        return section, torch.eye(section.shape[1], dtype=section.dtype, device=section.device)
    basis, triangle = torch.linalg.qr(times(section.T, inverse).T)
    return basis, triangle.T


def anchors_of(coupling: Coupling, lefts: Tensor, side: str) -> Sections:
    """The anchor of every section, from low-rank maps U_l U_l^T A_l with U_l = `lefts[l]` (m, k): Q^a = U_l, and P^a spans
    A_l^T U_l. For a shared section, the leading eigenvectors of the sum of the projectors; `side` (input, output or both)
    selects which of them count if the section is both input and output."""
    anchors = []
    for section in range(coupling.count):
        read = [torch.linalg.qr(coupling.maps[i].T @ lefts[i]).Q for i in coupling.readers(section)]
        written = [lefts[i] for i in coupling.writers(section)]
        chosen = {"input": read or written, "output": written or read, "both": read + written}[side]
        anchors.append(chosen[0] if len(chosen) == 1 else leading(torch.cat(chosen, dim=1), lefts.shape[2]))
    return anchors


def leading(seen: Tensor, k: int) -> Tensor:
    """The k leading left singular vectors (d, k) of F (d, j), j >= k."""
    if seen.shape[1] <= seen.shape[0]:  # F F^T would lose directions below 1e-8 of the largest
        return left_singular(seen)[:, :k]
    return torch.linalg.eigh(seen @ seen.T).eigenvectors.flip(1)[:, :k]


def descend(
    coupling: Coupling, start: Sections, anchors: Sections, strength: float, sweeps: int, tolerance: float
) -> tuple[Sections, list[float], bool]:
    """Update every section in turn until the relative decrease of E is below `tolerance`. Returns the sections, E at the start
    and after each sweep, and whether it converged. E never increases."""
    sections, shifts = list(start), [coupling.shift(s) for s in range(coupling.count)]
    noise = 16 * EPSILON * float(coupling.maps.square().sum())
    energies = [coupling.energy(sections, anchors, strength)]
    for _ in range(sweeps):
        trial = list(sections)
        for s, shift in enumerate(shifts):
            seen = coupling.seen(s, trial)
            if strength:
                seen = torch.cat([seen, strength**0.5 * anchors[s]], dim=1)
            old, before = trial[s], coupling.energy(trial, anchors, strength) if shift else 0.0
            trial[s] = leading(seen, old.shape[1])
            if shift and coupling.energy(trial, anchors, strength) > before:
                # E is quadratic in this section. A damped step maximises the tangent of a convex function, which is a lower
                # bound of the function, so that E does not increase.
                trial[s] = leading(torch.cat([seen, shift**0.5 * old], dim=1), old.shape[1])
        energy = coupling.energy(trial, anchors, strength)
        if energy > energies[-1]:  # through rounding
            return sections, energies, True
        sections = trial
        energies.append(energy)
        if energies[-2] - energy <= max(tolerance * energy, noise):
            return sections, energies, True
    return sections, energies, False


def solve(
    coupling: Coupling, anchors: Sections, strength: float, starts: int, sweeps: int, seed: int, tolerance: float = 1e-9
) -> tuple[Sections, dict[str, Any]]:
    """The best of `starts` descents and a record of all: from the anchors, from the leading directions (`Coupling.nested`), and
    from random sections. An infinite `strength` returns the anchors."""
    kinds = ["anchors", "leading", *["random"] * (starts - 2)][:starts]
    if strength == float("inf"):
        kinds, strength, sweeps = ["anchors"], 0.0, 0  # nothing moves
    elif not coupling.outputs:  # no section depends on another: the first sweep from anywhere is the optimum
        kinds = ["anchors"]
    found: list[Sections] = []
    record: list[dict[str, Any]] = []
    for number, kind in enumerate(kinds):
        start = coupling.nested(anchors[0].shape[1]) if kind == "leading" else anchors
        if kind == "random":
            generator = torch.Generator().manual_seed(seed + number)
            drawn = [torch.randn(section.shape, generator=generator, dtype=section.dtype) for section in start]
            start = [torch.linalg.qr(section.to(coupling.maps.device)).Q for section in drawn]
        sections, energies, converged = descend(coupling, start, anchors, strength, sweeps, tolerance)
        found.append(sections)
        record.append({"kind": kind, "energy": energies, "sweeps": len(energies) - 1, "converged": converged})
    winner = min(range(len(record)), key=lambda i: record[i]["energy"][-1])
    total = float(coupling.maps.square().sum())
    lost, anchored = (float(coupling.errors(sections).sum()) / total for sections in (found[winner], anchors))
    return found[winner], {"winner": winner, "starts": record, "error": lost, "anchors_error": anchored}
