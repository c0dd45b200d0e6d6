"""Sweeps over shares, ranks and criteria of the split: a fit each, which is a piece of the measurement."""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING, Any

from winnow.evaluation.spread import paired
from winnow.io.progress import every
from winnow.studies.base import Given
from winnow.studies.ffsplit.study import EQUAL, GRAM, HEAVY, LIGHT, RANKS, SEEDS, SHARES, delta_of, split_of
from winnow.studies.trials import Trial, loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from winnow.evaluation.results import PerWindow
    from winnow.studies.ffsplit.found import SweepRow


class Sweeps:
    """Split FFNs of many shares, ranks and criteria on one model, with their losses."""

    def __init__(self, given: Given, model: PreTrainedModel, ids: Tensor, first: Tensor, dense: PerWindow):
        self.given, self.model, self.ids, self.first, self.dense = given, model, ids, first, dense
        self.losses: dict[float, PerWindow] = {}  # of shares at equal bytes

    def all(self) -> list[SweepRow]:
        """A row per point: name of the sweep (`sweep`), heavy share, light rank or bytes, criterion, metric, bytes kept, loss."""
        criteria = [*((c, 0) for c in ("activation_x_row", "weight_norm", "leverage", "lowest")), *(("random", s) for s in SEEDS)]
        asked: list[tuple[str, tuple[Any, ...]]] = [("share", (share,)) for share in SHARES]
        asked += [("whitened", ()), *(("criterion", options) for options in criteria)]
        makers: dict[str, Callable[..., Any]] = {"share": self._share, "whitened": self._whitened, "criterion": self._criterion}
        rows: list[SweepRow] = []
        for kind, options in every(asked, "fits"):
            found = self.given.pieces.once(f"{kind} {options}", partial(makers[kind], *options))
            rows += found["rows"]
            if kind == "share":
                self.losses[options[0]] = found["equal"]
        return sorted(rows, key=lambda row: row["sweep"])

    def _share(self, share: float) -> dict[str, Any]:
        """The rows of a share of heavy neurons (`rows`), and the loss per window at equal bytes (`equal`)."""
        trial = Trial.of(self.given.files, self.given.moments, split_of(share), self.given.device)
        rows = [
            self._row("heavy share, a tenth of the rank", trial, trial.of_rank(LIGHT), share),
            self._row(f"heavy share, at most {EQUAL} of the bytes", trial, trial.of_bytes(EQUAL), share),
        ]
        if share == HEAVY:
            rows += [self._row("light rank", trial, trial.of_rank(rank), share, rank) for rank in RANKS]
        return {"rows": rows, "equal": self.losses[share]}

    def _whitened(self) -> dict[str, Any]:
        trial = Trial.of(self.given.files, self.given.moments, split_of(metric=GRAM), self.given.device)
        return {"rows": [self._row("light rank", trial, trial.of_rank(r), HEAVY, r, metric="gram") for r in RANKS]}

    def quarter(self) -> tuple[float, float]:
        """(loss of a quarter of heavy neurons above the best other share at the same bytes, standard error)."""
        own = self.losses[HEAVY]
        others = [paired(own, found) for share, found in self.losses.items() if share != HEAVY]
        return max(others)

    def _criterion(self, criterion: str, seed: int) -> dict[str, Any]:
        trial = Trial.of(self.given.files, self.given.moments, split_of(criterion=criterion, seed=seed), self.given.device)
        name = f"random, seed {seed}" if criterion == "random" else criterion
        return {"rows": [self._row("criterion", trial, trial.of_rank(LIGHT), HEAVY, criterion=name)]}

    def _row(
        self,
        sweep: str,
        trial: Any,
        sizes: Any,
        share: float,
        rank: float = LIGHT,
        metric: str = "weights",
        criterion: str = "activation",
    ) -> SweepRow:
        found = loss(trial.model(self.model, sizes), self.ids, self.first)
        if "bytes" in sweep:
            self.losses[share] = found
            rank = statistics.mean(sizes[g.name] / g.structure.whole(g.matrices) for g in trial.groups)
        return {
            "sweep": sweep,
            "heavy": share,
            "light_rank": rank,
            "criterion": criterion,
            "metric": metric,
            "keep_bytes": trial.kept(sizes),
            **delta_of(found, self.dense),
        }
