"""Study of linear recoverability (R2_lin, arXiv 2606.19379): how affine an FFN is, and the loss of replacing it."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from pydantic import Field

from winnow.studies.base import BATCH, LENGTH, SOLVED, Asked, Conclusion, Evidence, Given, Study, StudyOptions, fewer
from winnow.studies.claims import Answer
from winnow.studies.linearity.learned import SEEDS

if TYPE_CHECKING:
    import pandas as pd

    from winnow.studies.linearity.found import Linear
    from winnow.studies.records import Missing

FOLDS = 5
ROWS = 15_000  # tokens for gradient training, from the paper's survey
HEAL = {"rate": 1e-4, "batch": 4}  # from the paper
TRAINED, EVERY = 3000, 500  # steps of the trained baseline, and steps between its scores
PROBES = {"rank": 16, "steps": 3000}
ANSWERED = (
    *("highest", "lowest", "turns", "definition", "first_token", "trained", "standardised", "size", "swap", "heal"),
    *("bilinear", "signal", "learned", "learned_directions", "learned_order"),
)


class LinearityStudy(Study):
    title = "Linear recoverability of FFN blocks"
    reference = "R2_lin, arXiv 2606.19379"
    reads = ("windows", "evaluation")

    class Options(StudyOptions):
        length: int = LENGTH
        windows: int = Field(32, ge=2, description="evaluation windows at most, of losses with a block replaced")
        layers: int = Field(8, ge=2, description="blocks at most that are replaced, evenly spread; R^2 is of all")
        steps: int | None = Field(
            None,
            ge=1,
            description="steps of training a replaced block and its control; by default 200 as in the paper, fewer for models of "
            "more than 40 million numbers",
        )

        def steps_of(self, numbers: float) -> int:
            return self.steps or fewer(200, numbers)

    tables = ("blocks", "tokens", "ranks", "trained", "swaps", "learned", "changes")
    figures = ("profile", "swaps", "learned")

    def measure(self, given: Given) -> Linear | Missing:
        """R^2 of every block by all definitions, folds and token counts, also untrained; probes of the most and least linear
        blocks; swaps."""
        from winnow.studies.linearity.measurement import Measurement
        from winnow.studies.linearity.recoverability import ffn_blocks

        assert given.windows is not None
        assert given.evaluation is not None
        blocks = ffn_blocks(given.files.matrices)
        if not blocks:
            return {"missing": "the model has no FFN but mixtures of experts"}
        return Measurement(given.cut(self.options.length), blocks, self.options).all()

    def work(self, asked: Asked) -> tuple[float, float]:
        o, shape = self.options, asked.shape
        d, layers = shape.width, shape.layers
        windows, length = asked.calibration[0], min(o.length, asked.calibration[1])
        replaced, scored = min(o.layers, layers), asked.scored(o.windows, o.length)
        models = 1 + 2 * len(SEEDS)
        sums = 8.0 * layers * FOLDS * 2 * (2 * d**2)
        memory = 2 * asked.model + 2 * sums + asked.logits(min(BATCH, windows * length), 4)
        operations = models * (asked.forward(windows * length) + 16.0 * layers * windows * length * d**2)
        operations += asked.forward(scored) * (2 * replaced + 8)
        operations += (
            4 * 2.5 * asked.forward(o.steps_of(shape.numbers) * HEAL["batch"] * length)
        )  # two blocks, each with its control
        operations += SOLVED * d**3 * (20 * layers + models * layers + 3 * replaced)
        return memory, operations + 4 * TRAINED * 6.0 * 256 * d**2

    def conclude(self, evidence: Evidence) -> Conclusion:
        import pandas as pd

        from winnow.studies.linearity.learned import change_rows, learned_figure, learned_rows

        tables: dict[str, list[dict[str, Any]]] = {name: [] for name in self.tables}
        answers: dict[str, dict[str, Answer]] = {}
        identities: list[dict[str, Any]] = []
        measured: dict[str, Linear] = evidence.measured
        for model, found in measured.items():
            for claim, answer in _answers(found).items():
                answers.setdefault(claim, {})[model] = answer
            if "missing" in found:
                continue
            for row in found["blocks"]:
                listed = ("folds", "tokens", "ranks")
                tables["blocks"].append({"model": model, **{key: v for key, v in row.items() if key not in listed}})
                tables["tokens"] += [{"model": model, "layer": row["layer"], **point} for point in row["tokens"]]
                tables["ranks"] += [{"model": model, "layer": row["layer"], "rank": k, "r2": v} for k, v in row["ranks"]]
            for name, probe in found["probes"].items():
                tables["trained"] += [{"model": model, "block": name, "layer": probe["layer"], **row} for row in probe["trained"]]
            tables["swaps"] += [{"model": model, **row} for row in found["swaps"]]
            for name, rows in found["healed"].items():
                tables["swaps"] += [{"model": model, **row, "block": name} for row in rows]
            tables["learned"] += [{"model": model, **row} for row in learned_rows(found)]
            tables["changes"] += [{"model": model, **row} for row in change_rows(found)]
            identities += [{"model": model, "identity": name, "residual": value} for name, value in found["identities"].items()]
        frames = {name: pd.DataFrame(rows) for name, rows in tables.items()}
        figures = {"profile": _profile_figure(frames["blocks"]), "swaps": _swaps_figure(frames)}
        figures["learned"] = learned_figure(frames["learned"])
        return Conclusion(frames, figures, answers, pd.DataFrame(identities))


def _answers(found: Linear) -> dict[str, Answer]:
    from winnow.studies.linearity.learned import FRESH, RESIZED, change, correlation, rank_correlation

    if "missing" in found:
        return dict.fromkeys((f"linearity_{name}" for name in ANSWERED), Answer(missing=found["missing"]))
    blocks = sorted(found["blocks"], key=lambda row: row["layer"])
    r2 = [row["scalar"] for row in blocks]
    errors = {row["layer"]: row["scalar_fold_se"] for row in blocks}
    top, low = (pick(blocks, key=lambda row: row["scalar"]) for pick in (max, min))
    steps = [b - a for a, b in itertools.pairwise(r2)]
    turns = sum(a * b < 0 for a, b in itertools.pairwise(steps))
    full = {row["layer"]: row for row in found["swaps"] if row["rank"] == max(r["rank"] for r in found["swaps"])}
    cheapest = min(full.values(), key=lambda row: row["delta_nll"])
    replaced = [row for row in blocks if row["layer"] in full]
    rank = rank_correlation([row["scalar"] for row in replaced], [full[row["layer"]]["delta_nll"] for row in replaced])
    # Standard errors of the rank correlation of unrelated numbers.
    chance, of_replaced = (1 / math.sqrt(max(1, len(rows) - 1)) for rows in (blocks, replaced))
    last = {p: {r["inputs"]: r["r2"] for r in found["probes"][p]["trained"]} for p in found["probes"]}
    control = found["healed"]["most"][-1]
    return {
        "linearity_highest": Answer(top["scalar"], errors[top["layer"]]),
        "linearity_lowest": Answer(low["scalar"], errors[low["layer"]]),
        "linearity_turns": Answer(float(turns)),
        "linearity_definition": Answer(max(row["scalar"] - row["feature"] for row in blocks)),
        "linearity_first_token": Answer(top["scalar"] - top["no_first_token"], errors[top["layer"]]),
        "linearity_trained": Answer(last["most"]["closed form"] - last["most"]["as they are"]),
        "linearity_standardised": Answer(last["most"]["closed form"] - last["most"]["standardised"]),
        "linearity_size": Answer(top["times_smaller"]),
        "linearity_swap": Answer(cheapest["delta_nll"], cheapest["delta_nll_se"]),
        "linearity_heal": Answer(control["delta_nll"], control["delta_nll_se"]),
        "linearity_bilinear": Answer(max(found["probes"][p]["bilinear_gain"] for p in found["probes"])),
        "linearity_signal": Answer(rank, of_replaced),
        "linearity_learned": Answer(*change(found, FRESH, "scalar")),
        "linearity_learned_directions": Answer(*change(found, RESIZED, "scalar")),
        "linearity_learned_order": Answer(correlation(found, FRESH, "scalar"), chance),
    }


def _profile_figure(blocks: pd.DataFrame) -> Any:
    from winnow.reporting.figures import axes_grid, line_style, shared_legend

    models = list(blocks["model"].unique()) if len(blocks) else []
    figure, axes = axes_grid(len(models))
    shown = {"scalar": "grand mean (published)", "feature": "own mean of every output", "median": "median over outputs"}
    shown |= {"no_first_token": "grand mean, without first tokens"}
    for axis, model in zip(axes, models, strict=True):
        rows = blocks[blocks["model"] == model].sort_values("layer")
        for i, (key, label) in enumerate(shown.items()):
            style = {"markersize": 4, "linewidth": 1.2, **line_style(i)}
            if key == "no_first_token":  # often the same as with them: open markers let the line below be seen
                style |= {"markersize": 8, "linestyle": "--", "fillstyle": "none"}
            axis.plot(rows["layer"], rows[key].clip(lower=-1), label=label, **style)
        axis.set_title(f"{model}: held-out R² of the affine map", fontsize=9)
        axis.set_xlabel("layer")
        axis.set_ylabel("R² (share of the variance)")
        axis.xaxis.get_major_locator().set_params(integer=True)
    shared_legend(figure, axes, "variance about")
    return figure


def _swaps_figure(frames: dict[str, pd.DataFrame]) -> Any:
    from winnow.reporting.figures import axes_grid, line_style

    swaps, blocks = frames["swaps"], frames["blocks"]
    models = list(blocks["model"].unique()) if len(blocks) else []
    figure, axes = axes_grid(len(models))
    for axis, model in zip(axes, models, strict=True):
        own = swaps[(swaps["model"] == model) & (swaps["healed"] == "no")]
        rows = own[own["rank"] == own["rank"].max()].merge(blocks[blocks["model"] == model], on="layer")
        style = {**line_style(0), "linestyle": "none"}
        axis.errorbar(rows["scalar"], rows["delta_nll"], yerr=2 * rows["delta_nll_se"], markersize=5, capsize=2, **style)
        for _, row in rows.iterrows():
            place = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 8}
            axis.annotate(f"{row['layer']:.0f}", (row["scalar"], row["delta_nll"]), **place)
        axis.set_title(f"{model}: one block swapped (number: its layer)", fontsize=9)
        axis.set_xlabel("held-out R² of the block (grand mean)")
        axis.set_ylabel("loss above dense (nats per token)\nbars: 2 standard errors", fontsize=8)
    return figure
