"""`rounded`: W itself on a grid of 2 to 8 bits, rounded to nearest or with error feedback."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from winnow.models.architectures import Matrix, group_name
from winnow.numerics.grids import FEW_BITS, SHARES, Form, forms_of
from winnow.numerics.hadamard import ODD, factors_of, odd_part, rotatable
from winnow.numerics.operations import Operations
from winnow.structures.base import Fit, Part, Problem, Runtime, Structure, StructureOptions
from winnow.structures.forms import Bits

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)
SWEEPS, NUMBERS = 4, 1 << 24  # sweeps of coordinate descent on both sides; numbers (of all forms) rounded at once
# What is not a product of matrices, in floating-point operations that take as long: for every number of a form, for a tried
# scale, packing, and codes with feedback; and for the calls of a tried scale, of a step of the feedback, and of a column in a
# sweep of the descent, which several forms share. Fitted to times of one core for widths of 64 to 1,024.
SCALES, PACKED, GRAM, BOTH = 450, 2000, 6000, 45000
CALLS, STEP, COLUMN = 6e6, 2.7e6, 1e7
MATRICES = 16  # of the shape of the matrix that are held at once for every form
# As in `numerics.kernels` and `checkpoint.packed`, which import torch; a test compares them.
KERNEL_GROUPS, KERNEL_ROWS, PACKED_GROUPS = (32, 64, 128, 256), 16, (32, 64, 128)
Grid = Literal["symmetric", "full", "asymmetric"]
Turned = Literal["none", "inputs", "both"]
TURNED = {"none": "", "inputs": " with rotated inputs", "both": " with rotated inputs and outputs"}  # in the log


def at_once(shape: tuple[int, int]) -> int:
    """How many forms of a matrix are rounded at once."""
    return max(1, NUMBERS // (shape[0] * shape[1]))


def feeding_back(m: int, n: int, both: bool) -> tuple[float, float, float]:
    """Operations of error feedback in a matrix (m, n): of the roots of its metric, of every form, and of the calls that several
    forms share; `both`: along rows too."""
    if not both:
        return n**3, GRAM * m * n + 3.0 * m * n * n, STEP * n / 2
    # Products for the error to nearest, the feedback and the slopes; then for the sweeps.
    each = BOTH * m * n + 5.25 * m * n * (m + n) + (2 * SWEEPS - 1) * m * n * n
    return n**3 + m**3, each, STEP * (m + n) + SWEEPS * COLUMN * n


class Rounded(Structure):
    """Every number of W as a code times the scale of its group of `group` inputs of a row. Size s is the s-th of all forms
    (bits, group, grid, rotation) by stored bytes; for a single form, use `rank_fraction: 1` in the budget. With `nearest` and
    scales `largest` the metric only measures the error; with `feedback` it determines the codes: errors are compensated along
    columns in the Gram metric, as in GPTQ, and along rows and columns in the two-sided one. It also stores embeddings and heads
    (without rotations), whose rows are independent; of embeddings only the rows of the given tokens are dequantised. The matrix
    is dequantised in every call, which takes time; for a few tokens in bfloat16 on a CPU, a kernel of PyTorch reads the codes."""

    reference = "round to nearest; GPTQ, arXiv 2210.17323; both sides: YAQA, 2505.22988; rotations: QuIP#, 2402.04396"
    stores = (
        "steps (m, n) of `bits` bits, packed by rows; scale (m, ceil(n / group)), float16; zero, as scale, of `bits` bits; signs "
        "of rotated channels, a bit each"
    )
    formula = "m n steps, m ceil(n / group) scales; asymmetric as many zero points; rotated n or m + n signs"
    bias_name = "bias"
    engines = ("torch", "vllm", "compressed-tensors", "gguf")
    predicts = True
    outer = True
    timed = True

    class Options(StructureOptions):
        kind: Literal["rounded"]
        bits: Bits = Field(
            [8], min_length=1, description="bits of a number, 2 to 8, in ascending order; one or more sizes for each"
        )
        group: int | list[int | None] | None = Field(
            32, description="inputs of a row that share a scale, 4 or more, or a list of such numbers; null: the whole row"
        )
        grids: list[Grid] = Field(
            ["symmetric"],
            min_length=1,
            description="symmetric: steps to +-(2^(bits - 1) - 1); full: one more step on the side of a group's largest number, "
            "by the sign of its scale, without more bytes; asymmetric: a zero point of `bits` bits for every group",
        )
        scales: Literal["largest", "searched", "unbiased"] = Field(
            "largest",
            description="largest: the largest number of a group is at an end of the grid; searched: it may be clipped if that "
            "lowers the squared error, inputs weighted by the diagonal of the metric; unbiased: the same, without the shrinkage "
            "of the matrix by least squares",
        )
        rounding: Literal["nearest", "feedback"] = Field(
            "nearest",
            description="feedback: the numbers rounded later compensate for the error of each, according to a full metric",
        )
        rotations: list[Turned] = Field(
            ["none"],
            min_length=1,
            description="what is rounded: none, W; inputs, W V^T; both, U W V^T, with rotations U and V (random signs and a "
            "Hadamard transform) of inputs and outputs at run time; one or more sizes for each",
        )

        @field_validator("group")
        @classmethod
        def _wide(cls, group: Any) -> Any:
            groups = group if isinstance(group, list) else [group]
            if not groups or any(width is not None and width < 4 for width in groups):
                raise ValueError("a group must have at least 4 inputs, or be null for the whole row; a list must not be empty")
            return group

        @field_validator("group", "grids", "rotations")
        @classmethod
        def _once(cls, given: Any) -> Any:
            if isinstance(given, list) and len(set(given)) < len(given):
                raise ValueError("remove the duplicates")
            return given

    options: Options

    def __init__(self, options: StructureOptions):
        super().__init__(options)
        self.outer = self.options.rotations == ["none"]  # embeddings and heads are not rotated

    def forms(self, rows: int, columns: int) -> list[Form]:
        """The forms of sizes 1, 2, ... of a matrix (rows, columns)."""
        own = self.options
        groups = own.group if isinstance(own.group, list) else [own.group]
        return forms_of(rows, columns, own.bits, list(own.grids), groups, list(own.rotations))

    def untrainable(self) -> str | None:
        return "rounded stores only codes and scales"

    def refits(self) -> bool:
        return True

    def rounds(self) -> bool:
        return True

    def limit(self, group: list[Matrix]) -> int:
        return len(self.forms(*group[0].shape))

    def numbers(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        return 0  # numbers in the dtype of the weights; `index_bytes` counts everything

    def index_bytes(self, group: list[Matrix], size: int) -> int:
        return self.forms(*group[0].shape)[size - 1].bytes(*group[0].shape)

    def runs(self, group: list[Matrix], size: int, runtime: Runtime) -> bool:
        (m, n), form = group[0].shape, self.forms(*group[0].shape)[size - 1]
        signed = form.bits + (form.grid == "asymmetric")  # bits of a code from which its zero point is subtracted
        embeddings = group[0].role in ("embed_tokens", "tied")
        if runtime == "torch":
            return group[0].role == "embed_tokens" or (form.group in KERNEL_GROUPS and m % KERNEL_ROWS == 0)
        if form.rotation != "none":
            return runtime == "any"
        if runtime == "vllm" and group[0].outer:
            return False
        if runtime == "compressed-tensors" and embeddings:
            return False
        if runtime == "compressed-tensors":
            inside = math.gcd(form.group, n)
            whole = form.group == n
            return signed <= 8 and not group[0].transposed and (whole or inside in PACKED_GROUPS)
        if runtime == "gguf":
            blocks = n % 32 == 0 or group[0].role == "down_proj"  # whose inputs are filled up with zeros
            return signed <= 8 and blocks and (form.group % 32 == 0 or form.group == n)
        return super().runs(group, size, runtime)

    def work(self, group: list[Matrix], needs: tuple[str, ...]) -> tuple[float, Operations, float]:
        return self._work(group, needs, self.forms(*group[0].shape))

    def again(self, group: list[Matrix], needs: tuple[str, ...]) -> Operations:
        """The forms that are rounded at once with one."""
        forms = self.forms(*group[0].shape)
        count = min(len(forms), at_once(group[0].shape))
        return max(self._work(group, needs, [form] * count)[1] for form in forms)

    def _work(self, group: list[Matrix], needs: tuple[str, ...], forms: list[Form]) -> tuple[float, Operations, float]:
        """Codes of the forms, several rounded at once; searched scales, errors, and feedback in a full metric."""
        (m, n), own = group[0].shape, self.options
        both, together = "gradient_gram" in needs, min(len(forms), at_once((m, n)))
        tried = 1 + {"largest": 0, "searched": len(SHARES), "unbiased": len(FEW_BITS)}[own.scales]
        each = 1.0 * tried * SCALES * m * n + PACKED * m * n + 2 * m * n * (n + (m if both else 0))
        metric = batch = 0.0
        if own.rounding == "feedback" and "gram" in needs:
            metric, feedback, batch = feeding_back(m, n, both)
            each += feedback
        turns = {form.rotation for form in forms}
        operations = 1.0 * len(turns) * metric + len(forms) * each
        calls = len(forms) * tried * CALLS + (len(turns) - 1 + math.ceil(len(forms) / together)) * batch
        memory = MATRICES * together * m * n + 4 * n * n + 4 * m * m
        for which in sorted(turns - {"none"}):  # of W, of the metric, and back for every form
            turn = 2 * sum(factors_of(n)) + (2 * sum(factors_of(m)) if which == "both" else 0)
            operations += turn * (m * n * (1 + sum(form.rotation == which for form in forms)) + 2 * n * n + 2 * m * m)
            memory = MATRICES * together * m * n + 7 * n * n + 7 * m * m + 3 * m * n
        cached = sum(form.bytes(m, n) for form in forms)
        return 8.0 * memory, Operations(products=operations, calls=calls), 1.0 * cached

    def fit(self, problem: Problem, largest: int) -> Fit:
        import torch

        stored, errors = self.fitted(problem, range(1, self.limit(problem.group) + 1))
        return Fit(stored, torch.stack([errors[size] for size in range(len(errors))]), errors[0].sqrt()[None])

    def fit_at(self, problem: Problem, size: int) -> dict[str, Tensor]:
        return self.fitted(problem, [size])[0]

    def fitted(self, problem: Problem, sizes: Collection[int]) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
        """(tensors, errors) of these sizes, and the error of size 0. Which forms are rounded at once does not depend on `sizes`,
        so neither do the codes."""
        import torch

        from winnow.numerics.feedback import codes_of, metric_for
        from winnow.numerics.grids import scaled
        from winnow.numerics.linalg import weighted_error
        from winnow.numerics.rotated import rotation_of
        from winnow.numerics.rounding import multiplied, packed

        (dense,), name, (m, n) = problem.weights.values(), group_name(problem.group), problem.group[0].shape
        measured = self.metric_of_error(problem)
        stored: dict[str, Tensor] = {}
        errors = {0: weighted_error(dense, *measured)}
        by_rotation: dict[str, list[tuple[int, Form]]] = {}
        for size, form in enumerate(self.forms(m, n), start=1):
            by_rotation.setdefault(form.rotation, []).append((size, form))
        self._log_left_out(name, m, n)
        for which, own in by_rotation.items():
            if not any(size in sizes for size, _ in own):
                continue
            rotation = rotation_of(which, m, n, dense.device)
            stored |= {f"{which}.{side}": signs for side, signs in rotation.stored().items()}
            weight, columns, rows = rotation.matrix(dense), rotation.columns(measured[0]), rotation.rows(measured[1])
            metric = metric_for(columns, rows) if self.options.rounding == "feedback" else None
            diagonal = columns if columns.dim() == 1 else columns.diagonal() if metric is None else metric.columns.diagonal()
            said, count = f"{name}{TURNED[which]}", at_once((m, n))
            for part in (own[begin : begin + count] for begin in range(0, len(own), count)):
                if not any(size in sizes for size, _ in part):
                    continue
                forms = [form for _, form in part]
                made = [scaled(weight, form, self.options.scales, diagonal) for form in forms]
                found = codes_of(weight, forms, made, metric, SWEEPS, said)
                for (size, form), (scales, zeros), codes in zip(part, made, found, strict=True):
                    if size not in sizes:
                        continue
                    kept = rotation.back(multiplied(codes, scales.double(), form.group, zeros))
                    errors[size] = weighted_error(dense - kept, *measured)
                    stored |= {f"{size}.steps": packed(codes - form.offset, form.bits), f"{size}.scale": scales.view(torch.int16)}
                    if form.grid == "asymmetric":
                        stored[f"{size}.zero"] = packed(zeros - form.offset, form.bits)
        return stored, errors

    def _log_left_out(self, name: str, rows: int, columns: int) -> None:
        """Name the sides of a matrix that are asked to be rotated and are not."""
        asked = {"inputs": columns} if {"inputs", "both"} & set(self.options.rotations) else {}
        asked |= {"outputs": rows} if "both" in self.options.rotations else {}
        for side, width in asked.items():
            if not rotatable(width):
                why = f"the odd part of {width}, {odd_part(width)}, is larger than {ODD}"
                log.info("%s: the %s are not rotated: %s", name, side, why)

    def predicted(self, problem: Problem, tensors: dict[str, Tensor]) -> Tensor:
        import torch

        from winnow.numerics.linalg import weighted_error

        ((name, weight),) = problem.weights.items()
        columns, rows = problem.sites[name]["gram"], problem.outputs[name]["gradient_gram"]
        errors = [weighted_error(weight, columns, rows)]
        for size in range(1, len(self.forms(*weight.shape)) + 1):
            errors.append(weighted_error(weight - self.restored(tensors, size, weight.shape[1]), columns, rows))
        return torch.stack(errors) / 2

    def restored(self, tensors: dict[str, Tensor], size: int, columns: int) -> Tensor:
        """The matrix (m, columns) that is stored at `size` of a fit, in float64."""
        import torch

        from winnow.numerics.rotated import rotation_of
        from winnow.numerics.rounding import multiplied, unpacked

        rows = len(tensors[f"{size}.steps"])
        form = self.forms(rows, columns)[size - 1]
        steps = unpacked(tensors[f"{size}.steps"], columns, form.bits).double()
        scales, zeros = tensors[f"{size}.scale"].view(torch.float16).double(), None
        if form.grid == "asymmetric":
            zeros = unpacked(tensors[f"{size}.zero"], scales.shape[1], form.bits).double()
        return rotation_of(form.rotation, rows, columns, steps.device).back(multiplied(steps, scales, form.group, zeros))

    def layouts(self, group: list[Matrix], size: int) -> dict[str, dict[str, Any]]:
        m, n = group[0].shape
        form = self.forms(m, n)[size - 1]
        shape: dict[str, Any] = {"kind": self.kind(), "out": m, "in": n}
        own = {**shape, "bits": form.bits, "group": form.group, **({"zeros": True} if form.grid == "asymmetric" else {})}
        own |= {"rotation": form.rotation} if form.rotation != "none" else {}
        found = {group[0].module: own | ({"embeddings": True} if group[0].role in ("embed_tokens", "tied") else {})}
        return found | ({group[0].head: shape | {"tied": group[0].module}} if group[0].head else {})

    def timed_sizes(self, group: list[Matrix], count: int) -> list[int]:
        return list(range(1, self.largest(group) + 1))  # forms that follow each other have little in common

    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        import torch

        (module, layout), *tied = self.layouts(group, size).items()
        names = ["steps", "scale", *(["zero"] if "zeros" in layout else [])]
        own = {name: tensors[f"{size}.{name}"] for name in names} | {"weight": torch.empty(0)}
        if which := layout.get("rotation"):
            own = {f"rounded.{name}": tensor for name, tensor in own.items()} | {"weight": torch.empty(0)}
            sides = ("inputs", "outputs") if which == "both" else ("inputs",)
            own |= {side: tensors[f"{which}.{side}"] for side in sides}
        return {module: Part(layout, own)} | {head: Part(reference, {}) for head, reference in tied}

    @staticmethod
    def module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        from winnow.numerics.modules import RoundedEmbedding, RoundedHead, RoundedLinear, has_bias
        from winnow.numerics.rotated import RotatedLinear

        if "tied" in layout:
            return RoundedHead(layout["in"], layout["out"], has_bias(dense))
        zeros, which = layout.get("zeros", False), layout.get("rotation")
        if layout.get("embeddings"):
            factor = getattr(dense, "scalar_embed_scale", None)  # of Gemma
            return RoundedEmbedding(layout["out"], layout["in"], layout["bits"], layout["group"], zeros, factor)
        shape = (layout["in"], layout["out"], layout["bits"], layout["group"])
        if which is None:
            return RoundedLinear(*shape, has_bias(dense), zeros)
        if which not in ("inputs", "both"):
            raise ValueError(f"the rotation {which!r}, but only `inputs` and `both` are known")
        return RotatedLinear(RoundedLinear(*shape, False, zeros), which == "both", has_bias(dense))

    @staticmethod
    def share(model: nn.Module, name: str, layout: dict[str, Any]) -> dict[str, str]:
        from winnow.numerics.modules import RoundedEmbedding

        if "tied" in layout:
            own: Any = model.get_submodule(name)
            owner = model.get_submodule(layout["tied"])
            if not isinstance(owner, RoundedEmbedding):
                raise ValueError(f"{layout['tied']} are no rounded embeddings")
            own.tied_to = (owner,)
        return {}
