"""Whether there are enough calibration tokens for second moments; the sentences of logs, plans and the report.

The error of a least-squares fit to n channels of T independent tokens is about 1 - n / T of the irreducible error on these tokens
and 1 + n / T of it on others. Their ratio is about (1 - n / T)^-2: 1.14 at 16 tokens per channel, 1.8 at 4, unbounded at 1. Below
1 the second moment does not have full rank, and a fit to all channels can be exact on these tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from winnow.models.shape import Shape
    from winnow.planning.plan import Plan

ENOUGH = 16  # tokens per channel


def too_few(width: int, tokens: int) -> bool:
    """Whether there are so few tokens per channel that a fit to their second moment is clearly worse on other text."""
    return tokens < ENOUGH * width


def few_tokens(sites: Iterable[tuple[str, int, int]], windows: int) -> list[str]:
    """One sentence for all inputs of one width with equally few tokens. `sites`: (site, width, counted tokens) of all layers;
    `windows`: the number of calibration windows. Of experts, which receive different tokens, the smallest count is named."""
    found: dict[tuple[int, int], dict[str, None]] = {}
    experts: dict[tuple[str, int], list[int]] = {}
    for site, width, tokens in sites:
        if site.startswith("expert"):
            experts.setdefault((site.partition(".")[2], width), []).append(tokens)
        elif too_few(width, tokens):
            found.setdefault((width, tokens), {})[site] = None
    lines = [_sentence(", ".join(names), width, tokens, windows) for (width, tokens), names in found.items()]
    for (site, width), counts in experts.items():
        if few := sum(too_few(width, tokens) for tokens in counts):
            lines.append(_sentence(f"{site} of {few} of {len(counts)} experts", width, min(counts), windows))
    return lines


def _sentence(name: str, width: int, tokens: int, windows: int) -> str:
    rank = "cannot have full rank" if tokens < width else "is a rough estimate"
    needed = f"{math.ceil(windows * ENOUGH * width / tokens):,} windows" if tokens else "more windows"
    return (
        f"{name}: {tokens:,} calibration tokens for {width:,} channels, whose second moment {rank}: fits lose more on other "
        f"text than on this; use {needed} instead of {windows:,} ({ENOUGH} tokens per channel)"
    )


def planned(plan: Plan, shapes: dict[str, Shape]) -> list[str]:
    """The sentences of all calibrations with second moments, for the models (by preset name) with a shape. Padding is counted as
    tokens; experts are skipped, as their tokens are not known yet."""
    found: dict[str, None] = {}
    for cell in (cell for cell in plan.cells if cell.model in shapes and plan.cells.reads_moments(cell)):
        preset = plan.config.calibrations[str(cell.calibration)]
        tokens = preset.windows * (preset.length - (not preset.first_token))
        sites = [(m.site, m.shape[1], tokens) for m in shapes[cell.model].matrices if m.expert is None]
        name = plan.preset_of_seed[str(cell.calibration)]
        found |= {f"{cell.model}, calibration {name}: {line}": None for line in few_tokens(sites, preset.windows)}
    return list(found)
