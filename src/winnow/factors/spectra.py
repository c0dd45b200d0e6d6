"""Spectra of the fitted groups: singular values in the fit's metric, and effective ranks under four definitions."""

from __future__ import annotations

import numpy as np

from winnow.io.records import SpectrumRow


def effective_ranks(singular_values: np.ndarray) -> dict[str, float]:
    """k90, k95, k99: smallest k with that share of the squared values; stable rank ||s||^2 / s_1^2; entropy rank
    exp(H(s^2 / ||s||^2)) (Roy and Vetterli 2007). All 0 for a zero matrix."""
    energy = np.square(singular_values.astype(np.float64))
    total = float(energy.sum())
    if total == 0.0:
        return dict.fromkeys(("k90", "k95", "k99", "stable_rank", "entropy_rank"), 0.0)
    share = energy / total
    reached = np.cumsum(share)
    ranks = {f"k{p}": float(np.searchsorted(reached, p / 100 - 1e-12) + 1) for p in (90, 95, 99)}
    positive = share[share > 0]
    entropy = float(-(positive * np.log(positive)).sum())
    return {**ranks, "stable_rank": total / float(energy.max()), "entropy_rank": float(np.exp(entropy))}


def spectrum_row(name: str, spectrum: np.ndarray, error: np.ndarray, numbers: np.ndarray, metric: str) -> SpectrumRow:
    """One row of spectra.parquet: layer(s), role(s), metric, singular values, error and stored numbers at every size, effective
    ranks."""
    layer, _, roles = name.partition(".")
    return {
        "group": name,
        "layer": int(layer.split("-")[0]),
        "role": roles,
        "metric": metric,
        "singular_values": spectrum.tolist(),
        "error": error.tolist(),
        "numbers": numbers.tolist(),
        **effective_ranks(spectrum),  # type: ignore[typeddict-item]
    }
