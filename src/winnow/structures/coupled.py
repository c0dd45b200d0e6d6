"""`coupled`: the matrices of one role in all layers between shared subspaces, W_l ~ Q_l core_l P_l^T."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from winnow.models.architectures import Matrix, group_name
from winnow.structures.base import Fit, Part, Problem, Structure, StructureOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from winnow.numerics.coupling import Coupling, Sections

log = logging.getLogger(__name__)

Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# JSON has no infinity, so a word is used; YAML's `.inf` means the same.
Strength = Annotated[Finite | Literal["inf"], BeforeValidator(lambda value: "inf" if value == math.inf else value)]


class Coupled(Structure):
    """Sections P_l (n, k) and Q_l (m, k) minimise sum_l ||A_l - Q_l Q_l^T A_l P_l P_l^T||^2 + (lambda / 2) times the squared
    distances of all sections from anchors; A_l = W_l C^{1/2}, C the mean metric of the layers that share P_l.

    W_l is stored as Q_l core_l (C^{-1/2} P_l)^T; chained sections (square W, metric `weights`) share a tensor, Q_l = P_{l+1}.
    With one side, (A_l P_l) (C^{-1/2} P_l)^T minimises sum_l ||A_l - A_l P_l P_l^T||^2 + the same term. `Fit.error` is that of
    the initial values, an upper bound if lambda = 0 and starts >= 2; the sum of squares of `Fit.spectrum` beyond k is a lower
    bound."""

    reference = "cross-layer subspace coupling, arXiv 2605.30836 (reconstructed)"
    stores = "sections (m, k), (n, k) once each, core (k, k) per layer; one side: right (k, n) once, left (m, k) per layer"
    formula = "k (m outputs + n inputs) + L k^2; chained k m sections + L k^2; one side k (n inputs + L m)"
    bias_name = "left.bias"
    in_float64 = ("maps", "lefts", "inverses", "spectrum")
    weighs_outputs = False
    optimised_at_size = True

    class Options(StructureOptions):
        kind: Literal["coupled"]
        tying: Literal["free", "grouped", "tied"] = Field(
            "free", description="sections per layer, shared by `layers` layers, or shared by all"
        )
        layers: int = Field(2, ge=1, description="consecutive layers (chained: sections) that are shared, for `grouped`")
        sections: Literal["auto", "chained", "separate"] = Field(
            "auto", description="chained: a layer's output section is the next layer's input section; auto: chained if possible"
        )
        sides: Literal["two", "one"] = Field("two", description="project outputs and inputs, or inputs only")
        anchor: Literal["metric", "plain", "whitened"] = Field(
            "metric",
            description="low-rank map that defines the anchors: in the method's metric, of the weights, or in the Gram metric",
        )
        anchor_side: Literal["input", "output", "both"] = Field(
            "both", description="which map anchors a section between two layers: that with it as input, as output, or both"
        )
        anchor_strength: Strength = Field(0.0, description="lambda, as a share of the mean ||A_l||^2; `inf` stores the anchors")
        starts: int = Field(3, ge=1, description="number of initialisations: anchors, leading directions, then random sections")
        sweeps: int = Field(50, ge=1, description="maximum number of updates of every section")
        seed: int = Field(0, ge=0, description="seed of the random initialisations")

        @model_validator(mode="after")
        def _possible(self) -> Coupled.Options:
            if self.sides == "one" and self.sections == "chained":
                raise ValueError("`sides: one` has no output sections to be chained; use `sections: separate`")
            return self

    options: Options
    _last: tuple[dict[str, Tensor], int, tuple[Coupling, Sections, dict[str, Any]]] | None = None  # cache of the last result

    def needs(self) -> tuple[str, ...]:
        return ("gram",) if self.options.anchor == "whitened" else ()

    def refits(self) -> bool:
        return self.options.sides == "one"

    def groups(self, matrices: list[Matrix]) -> list[list[Matrix]]:
        found: dict[tuple[str, tuple[int, int]], list[Matrix]] = {}
        for m in (m for m in matrices if m.expert is None):  # experts of two layers do not correspond
            found.setdefault((m.role, m.shape), []).append(m)
        return [sorted(group, key=lambda m: m.layer) for group in found.values()]

    def limit(self, group: list[Matrix]) -> int:
        return min(group[0].shape)

    def numbers(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        (m, n), square = group[0].shape, group[0].shape[0] == group[0].shape[1]
        if tensors:
            inputs, outputs = tensors["inputs"].tolist(), tensors["outputs"].tolist()
        else:  # the metric is not known before the fit: a lower bound
            inputs, outputs = self._numbering(len(group), square and self.options.sections != "separate")
        return size * (n * len(set(inputs)) + m * len(set(outputs) - set(inputs)) + len(group) * (size if outputs else m))

    def _numbering(self, layers: int, chained: bool) -> tuple[list[int], list[int]]:
        """The sections of every layer's inputs and outputs; no outputs if only inputs are projected."""
        from winnow.numerics.coupling import numbering

        together = {"free": 1, "grouped": self.options.layers, "tied": layers + 1}[self.options.tying]
        inputs, outputs = numbering(layers, together, chained)
        return inputs, outputs if self.options.sides == "two" else []

    @staticmethod
    def _of_weights(problem: Problem) -> bool:
        return problem.metric is not None and problem.metric.kind() == "weights"

    def _chained(self, problem: Problem) -> bool:
        (m, n), wanted = problem.group[0].shape, self.options.sections
        possible = m == n and self._of_weights(problem) and self.options.sides == "two"
        if wanted == "chained" and not possible:
            raise ValueError(f"chained sections need square matrices, not {m} x {n}, and the metric `weights`; use `separate`")
        return possible and wanted != "separate"

    def fit(self, problem: Problem, largest: int) -> Fit:
        import torch

        from winnow.numerics.coupling import Coupling, roots, times
        from winnow.numerics.linalg import leading_directions

        group, weights, tensors = problem.group, [problem.weights[m.name] for m in problem.group], {}
        inputs, outputs = self._numbering(len(group), self._chained(problem))
        coupling = Coupling(torch.stack(weights), inputs, outputs)
        if not self._of_weights(problem):
            readers = [[group[i] for i in coupling.readers(section)] for section in range(1 + inputs[-1])]
            pairs = [roots(problem.columns(r), problem.precision, f"the inputs' metric of {r[0].name}") for r in readers]
            tensors["inverses"] = torch.stack([inverse for _, inverse in pairs])
            maps = [times(w, pairs[section][0]) for w, section in zip(weights, inputs, strict=True)]
            coupling = Coupling(torch.stack(maps), inputs, outputs)
        best = [leading_directions(a, a.new_ones(a.shape[1])) for a in coupling.maps]
        spectrum = torch.stack([found.spectrum for found in best]).square().sum(0).sqrt()
        if self.options.anchor != "metric":
            plain = self.options.anchor == "plain"
            columns = [
                w.new_ones(w.shape[1]) if plain else problem.sites[m.name]["gram"] for m, w in zip(group, weights, strict=True)
            ]
            best = [leading_directions(w, c, problem.precision) for w, c in zip(weights, columns, strict=True)]
        tensors |= {"maps": coupling.maps, "lefts": torch.stack([torch.linalg.qr(found.left[:, :largest]).Q for found in best])}
        tensors |= {"inputs": torch.tensor(inputs), "outputs": torch.tensor(outputs, dtype=torch.int64), "spectrum": spectrum}
        error = coupling.nested_error(coupling.nested(self.limit(group)))
        return Fit(tensors, error[: largest + 1], spectrum)

    def _solved(self, tensors: dict[str, Tensor], size: int) -> tuple[Coupling, Sections, dict[str, Any]]:
        """The coupling, its sections at `size`, and the report."""
        from winnow.numerics.coupling import Coupling, anchors_of, solve

        if self._last is None or self._last[0] is not tensors or self._last[1] != size:
            options = self.options
            coupling = Coupling(tensors["maps"], tensors["inputs"].tolist(), tensors["outputs"].tolist())
            anchors = anchors_of(coupling, tensors["lefts"][:, :, :size], options.anchor_side)
            total, tail = float(coupling.maps.square().sum()), float(tensors["spectrum"][size:].square().sum())
            strength = float(options.anchor_strength) * total / len(coupling.maps)
            sections, report = solve(coupling, anchors, strength, options.starts, options.sweeps, options.seed)
            self._last = (tensors, size, (coupling, sections, {"size": size, **report, "lower_bound": tail / total}))
        return self._last[2]

    def report(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Any]:
        """Energies of all sweeps and initialisations, the winner, and relative errors: stored, of the anchors, a lower bound."""
        return self._solved(tensors, size)[2]

    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        from winnow.numerics.coupling import right_factor

        coupling, sections, report = self._solved(tensors, size)
        best, text = report["starts"][report["winner"]], "%s, size %d: error %.6f (%.6f by anchors), %d sweeps from the %s start"
        log.info(text, group_name(group), size, report["error"], report["anchors_error"], best["sweeps"], best["kind"])
        inverses = tensors.get("inverses", [None] * len(group))
        found: dict[str, Part] = {}
        owners: dict[int, str] = {}
        for layer, m in enumerate(group):
            source = coupling.inputs[layer]
            right, mixing = right_factor(sections[source], inverses[source])
            core = coupling.core(layer, sections) @ mixing
            if coupling.outputs:
                target = coupling.outputs[layer]
                private, own = "core.weight", {"input": (source, right), "left.weight": (target, sections[target])}
            else:
                private, own = "left.weight", {"right.weight": (source, right.T)}
            kept, shared = {"weight": core.new_empty(0), private: core}, {}
            for name, (section, tensor) in own.items():
                if section in owners:
                    shared[name] = owners[section]
                else:
                    owners[section], kept[name] = f"{m.module}.{name}", tensor
            layout = {"kind": self.kind(), "sides": self.options.sides, "out": m.shape[0], "in": m.shape[1], "rank": size}
            found[m.module] = Part({**layout, "shared": shared}, kept)
        return found

    @staticmethod
    def module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        from winnow.numerics.modules import LowRankLinear, TwoSidedLinear, has_bias

        cls = TwoSidedLinear if layout["sides"] == "two" else LowRankLinear
        return cls(layout["in"], layout["out"], layout["rank"], has_bias(dense))

    @staticmethod
    def share(model: nn.Module, name: str, layout: dict[str, Any]) -> dict[str, str]:
        own = model.get_submodule(name)
        for tensor, owner in layout["shared"].items():
            (inner, _, leaf), kept = tensor.rpartition("."), model.get_parameter(owner)
            if kept.shape != own.get_parameter(tensor).shape:
                raise ValueError(f"{tensor} differs in shape from {owner}")
            setattr(own.get_submodule(inner), leaf, kept)
        own._tied_weights_keys = layout["shared"]  # type: ignore[assignment]  # `save_pretrained` stores them once
        return {f"{name}.{tensor}": owner for tensor, owner in layout["shared"].items()}
