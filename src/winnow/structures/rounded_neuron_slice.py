"""`rounded_neuron_slice`: the smaller FFN of `neuron_slice`, its matrices rounded to 2 to 8 bits."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field

from winnow.models.architectures import Matrix, group_name
from winnow.numerics.grids import Form
from winnow.numerics.operations import NONE, Operations
from winnow.structures.base import Fit, Part, Problem, Runtime
from winnow.structures.ffn import FUSED, FfnStructure, parted, parts_of
from winnow.structures.forms import ASCENDING
from winnow.structures.neuron_slice import NeuronSlice
from winnow.structures.parts import PartOptions, below, layout_and_tensors, named_below, of_form, rounded_forms, rounder
from winnow.structures.rounded import Rounded

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)
Share = Annotated[float, Field(gt=0, le=1)]


class Size(NamedTuple):
    """The number of neurons, the forms of gate and up (rows of d numbers) and of down (rows of `neurons`), and their bytes."""

    neurons: int
    inner: Form
    down: Form
    bytes: int


@cache
def _size(matrices: int, d: int, neurons: int, bits: int, grid: str, group: int | None) -> Size:
    inner, down = (Form(bits, grid, min(group or width, width)) for width in (d, neurons))
    return Size(neurons, inner, down, (matrices - 1) * neurons * inner.row_bytes(d) + d * down.row_bytes(neurons))


class RoundedNeuronSlice(FfnStructure):
    """The first k neurons as in `neuron_slice`, with down corrected for the others; gate, up and down are stored like matrices
    of `rounded`. With error feedback each is rounded in the second moment of its own input, and with the criterion `loss` in
    that of the gradient at its output too. Size s is the s-th of all pairs of k and a form (bits, group, grid) by stored bytes,
    of those that store less than 16 bits a number. Its error is that of the dropped neurons and of rounding down; what rounding
    gate and up changes in the hidden units is only in the predicted losses."""

    reference = "pruned, then rounded, as in SPQ, arXiv 2602.18420"
    stores = "k rows of gate and up, down (d, k), each as `rounded` stores a matrix"
    formula = "3 k d steps, 2 k d without gate; scales as in `rounded`"
    objective = "ffn_output"
    engines = ("torch", "vllm", "gguf")
    predicts = True
    timed = True

    class Options(NeuronSlice.Options, PartOptions):
        kind: Literal["rounded_neuron_slice"]  # type: ignore[assignment]
        neurons: Annotated[list[Share], ASCENDING] = Field(
            [0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0],
            min_length=1,
            description="the numbers of kept neurons to choose from, as shares of all, in ascending order",
        )

    options: Options

    @property
    def rounded(self) -> Rounded:
        return rounder(self.options)

    @property
    def slice(self) -> NeuronSlice:
        own = {key: getattr(self.options, key) for key in NeuronSlice.Options.model_fields}
        return NeuronSlice(NeuronSlice.Options(**own | {"kind": "neuron_slice"}))

    def needs(self) -> tuple[str, ...]:
        return self.slice.needs()

    def rounds(self) -> bool:
        return True

    def judged(self, group: list[Matrix]) -> list[Matrix]:
        return group

    def sizes(self, group: list[Matrix]) -> list[Size]:
        """What sizes 1, 2, ... store of [gate, up, down] or [up, down], in which gate and up may be fused."""
        parts, own = parts_of(group), self.options
        d, f = parts[-1].shape
        groups = own.group if isinstance(own.group, list) else [own.group]
        counts = dict.fromkeys(max(1, round(share * f)) for share in own.neurons)
        found = (
            _size(len(parts), d, count, bits, grid, width)
            for count in counts
            for bits in own.bits
            for width in groups
            for grid in own.grids
        )
        return sorted((s for s in dict.fromkeys(found) if s.bytes < 2 * len(parts) * d * f), key=lambda s: s.bytes)

    def limit(self, group: list[Matrix]) -> int:
        return len(self.sizes(group))

    def count(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        """Only biases: `index_bytes` counts the matrices."""
        (*inner, down), found = group, self.sizes(group)
        neurons = found[size - 1].neurons if size else 0
        return neurons * sum(m.bias for m in inner) + (down.shape[0] if down.bias else 0)

    def index_bytes(self, group: list[Matrix], size: int) -> int:
        return self.sizes(group)[size - 1].bytes if size else 0

    def runs(self, group: list[Matrix], size: int, runtime: Runtime) -> bool:
        if runtime not in ("torch", "gguf"):
            return super().runs(group, size, runtime)
        if runtime == "gguf" and any(m.role == FUSED for m in group):
            return False  # its halves are stored apart
        parts = zip(*self._forms(parts_of(group), self.sizes(group)[size - 1]), strict=True)
        return all(one.runs([part], 1, runtime) for part, one in parts)

    def _forms(self, group: list[Matrix], size: Size) -> tuple[list[Matrix], list[Rounded]]:
        """(the matrices of the smaller FFN, `rounded` of the form of each)"""
        count, rounded = len(group) - 1, self.rounded
        return self._parts(group, size), [*([of_form(rounded, size.inner)] * count), of_form(rounded, size.down)]

    def _parts(self, group: list[Matrix], size: Size) -> list[Matrix]:
        *inner, down = group
        d = down.shape[0]
        return [*(replace(m, shape=(size.neurons, d)) for m in inner), replace(down, shape=(d, size.neurons))]

    def work(self, group: list[Matrix], needs: tuple[str, ...]) -> tuple[float, Operations, float]:
        """As in `neuron_slice`, and the rounding of every size, of those with as many neurons at once."""
        memory, operations, _ = self.slice.work(group, needs)
        cached = 8.0 * group[-1].shape[1]
        for size in {size.neurons: size for size in self.sizes(group)}.values():
            for part in self._parts(parts_of(group), size):
                held, rounding, kept = self.rounded.work([part], self.needs())
                memory, operations, cached = max(memory, held), operations + rounding, cached + kept
        return memory, operations, cached

    def again(self, group: list[Matrix], needs: tuple[str, ...]) -> Operations:
        sizes = {size.neurons: size for size in self.sizes(group)}
        rounding = (
            sum((self.rounded.again([p], self.needs()) for p in self._parts(parts_of(group), s)), NONE) for s in sizes.values()
        )
        return self.slice.work(group, needs)[1] + max(rounding, default=NONE)

    def fit_ffn(self, problem: Problem, largest: int) -> Fit:
        import torch

        stored, errors, spectrum = self._fitted(problem, range(1, self.limit(problem.group) + 1))
        return Fit(stored, torch.stack([errors[size] for size in range(len(errors))]), spectrum)

    def fit_at(self, problem: Problem, size: int) -> dict[str, Tensor]:
        return self._fitted(parted(problem), [size])[0]

    def _fitted(self, problem: Problem, asked: Collection[int]) -> tuple[dict[str, Tensor], dict[int, Tensor], Tensor]:
        """(tensors of the sizes asked for, {size: error} of them and of size 0, spectrum)"""
        from winnow.numerics.linalg import weighted_error

        down, own = problem.group[-1], self.slice
        sliced = own.fit_ffn(problem, down.shape[1])
        order, errors = sliced.tensors["order"], {0: sliced.error[0]}
        gram = problem.sites[down.name]["gram"][order][:, order]
        stored = {name: t for name, t in sliced.tensors.items() if name.endswith(".bias") or name == "order"}
        sizes = {number: size for number, size in enumerate(self.sizes(problem.group), start=1) if number in asked}
        rounded = self.rounded
        for k in sorted({size.neurons for size in sizes.values()}):  # the forms of as many neurons at once
            weights, change = own.weights(problem.group, sliced.tensors, k), problem.weights[down.name][:, order]
            alike = {number: size for number, size in sizes.items() if size.neurons == k}
            made = {}
            for m in problem.group:
                forms = {size.down if m is down else size.inner for size in alike.values()}
                made[m.role] = rounded_forms(m, rounded, weights[m.role], *self._metric(problem, m, order[:k]), forms)
            for number, size in alike.items():
                for m in problem.group:
                    tensors = made[m.role][size.down if m is down else size.inner]
                    stored |= named_below(tensors, f"{number}.{m.role}.")
                left = change.clone()
                left[:, :k] -= of_form(rounded, size.down).restored(tensors, 1, k)  # of down, the last of the matrices
                errors[number] = weighted_error(left, gram, None)
                log.info(
                    "%s: %d neurons, %d bits: error %.3g without rounding, %.3g with rounded down",
                    group_name(problem.group), k, size.down.bits, float(sliced.error[k]), float(errors[number]),
                )  # fmt: skip
        return stored, errors, sliced.spectrum

    def _metric(self, problem: Problem, part: Matrix, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        """(C, R) of a matrix of the smaller FFN."""
        columns = problem.sites[part.name]["gram"]
        gradients = problem.outputs[part.name]["gradient_gram"] if "gradient_gram" in self.needs() else None
        if part.role == problem.group[-1].role:
            return columns[kept][:, kept], gradients
        return columns, None if gradients is None else gradients[kept][:, kept]

    def predicted(self, problem: Problem, tensors: dict[str, Tensor]) -> Tensor:
        """The sum of what the changes of the matrices cost by themselves. The change of down, with zeros for the dropped neurons,
        includes what it does not compensate for."""
        import torch

        from winnow.numerics.linalg import weighted_error

        problem = parted(problem)
        down, order = problem.group[-1], tensors["order"]

        def cost(matrix: Matrix, change: Tensor, kept: Tensor | slice) -> Tensor:
            columns, rows = problem.sites[matrix.name]["gram"], problem.outputs[matrix.name]["gradient_gram"]
            if matrix is down:
                return weighted_error(change, columns[order][:, order], rows)
            return weighted_error(change, columns, rows[kept][:, kept])

        whole = problem.weights[down.name][:, order]
        found = [cost(down, whole, order)]
        for number, size in enumerate(self.sizes(problem.group), start=1):
            kept, total = order[: size.neurons], torch.zeros_like(found[0])
            for m, (part, one) in zip(problem.group, zip(*self._forms(problem.group, size), strict=True), strict=True):
                matrix = one.restored(below(tensors, f"{number}.{m.role}."), 1, part.shape[1])
                change = whole.clone() if m is down else problem.weights[m.name][kept]
                change[:, : matrix.shape[1]] -= matrix
                total = total + cost(m, change, kept)
            found.append(total)
        return torch.stack(found) / 2

    def predicting(self, group: list[Matrix]) -> float:
        (d, f), held = group[-1].shape, super().predicting(group)
        return held + 8.0 * (2 * f * f + 2 * d * d)  # second moments of the gradients of gate and up

    def layouts_ffn(self, group: list[Matrix], size: int) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for part, one in zip(*self._forms(group, self.sizes(group)[size - 1]), strict=True):
            found |= {module: layout | {"kind": self.kind()} for module, layout in one.layouts([part], 1).items()}
        return found

    def timed_sizes(self, group: list[Matrix], count: int) -> list[int]:
        return list(range(1, self.largest(group) + 1))  # as of `rounded`

    def store_ffn(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        form = self.sizes(group)[size - 1]
        found: dict[str, Part] = {}
        for part, one in zip(*self._forms(group, form), strict=True):
            stored = layout_and_tensors(part, one, below(tensors, f"{size}.{part.role}."))
            if part.bias:
                down = part.role == group[-1].role
                stored.tensors["bias"] = tensors[f"{part.role}.bias"][: None if down else form.neurons]
            found[part.module] = Part(stored.layout | {"kind": self.kind()}, stored.tensors)
        return found

    @staticmethod
    def part_module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        module: Any = Rounded.module(layout, dense)
        module.whole = False
        return module
