"""`rounded`: W itself on a grid of 2 to 8 bits, rounded to nearest or with error feedback."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from winnow.models.architectures import Matrix, group_name
from winnow.numerics.grids import FEW_BITS, SHARES, Form, forms_of
from winnow.structures.base import Fit, Part, Problem, Runtime, Structure, StructureOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

SWEEPS, NUMBERS = 4, 1 << 24  # sweeps of coordinate descent on both sides; numbers (of all forms) rounded at once
# What is not a product of matrices, in floating-point operations that take as long: for every number of a form, for a tried
# scale, packing, and codes with feedback; and for the calls of a tried scale, of a step of the feedback, and of a column in a
# sweep of the descent, which several forms share. Fitted to times of one core for widths of 64 to 1,024.
SCALES, PACKED, GRAM, BOTH = 450, 2000, 6000, 45000
CALLS, STEP, COLUMN = 6e6, 2.7e6, 1e7
MATRICES = 16  # of the shape of the matrix that are held at once for every form
# As in `numerics.kernels` and `checkpoint.packed`, which import torch; a test compares them.
KERNEL_GROUPS, KERNEL_ROWS, PACKED_GROUPS = (32, 64, 128, 256), 16, (32, 64, 128)
Bits = Annotated[int, Field(ge=2, le=8)]
Grid = Literal["symmetric", "full", "asymmetric"]


class Rounded(Structure):
    """Every number of W as a code times the scale of its group of `group` inputs of a row. Size s is the s-th of all forms (bits,
    group, grid) by stored bytes; for a single form, use `rank_fraction: 1` in the budget. With `nearest` and scales `largest`
    the metric only measures the error; with `feedback` it determines the codes: errors are compensated along columns in the Gram
    metric, as in GPTQ, and along rows and columns in the two-sided one. The matrix is
    dequantised in every call, which takes time; for a few tokens in bfloat16 on a CPU, a kernel of PyTorch reads the codes."""

    reference = "round to nearest; GPTQ, arXiv 2210.17323; both sides as in YAQA, arXiv 2505.22988"
    stores = "steps (m, n) of `bits` bits, packed by rows; scale (m, ceil(n / group)), float16; zero, as scale, of `bits` bits"
    formula = "m n steps, m ceil(n / group) scales; asymmetric as many zero points"
    bias_name = "bias"
    engines = ("torch", "vllm", "compressed-tensors", "gguf")
    predicts = True
    timed = True

    class Options(StructureOptions):
        kind: Literal["rounded"]
        bits: list[Bits] = Field(
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

        @field_validator("bits")
        @classmethod
        def _ascending(cls, bits: list[int]) -> list[int]:
            if bits != sorted(set(bits)):
                raise ValueError(f"bits must be in ascending order without duplicates: {sorted(set(bits))}")
            return bits

        @field_validator("group")
        @classmethod
        def _wide(cls, group: Any) -> Any:
            groups = group if isinstance(group, list) else [group]
            if not groups or any(width is not None and width < 4 for width in groups):
                raise ValueError("a group must have at least 4 inputs, or be null for the whole row; a list must not be empty")
            return group

        @field_validator("group", "grids")
        @classmethod
        def _once(cls, given: Any) -> Any:
            if isinstance(given, list) and len(set(given)) < len(given):
                raise ValueError("remove the duplicates")
            return given

    options: Options

    def forms(self, columns: int) -> list[Form]:
        """The forms of sizes 1, 2, ... of a matrix with `columns` inputs."""
        own = self.options
        return forms_of(columns, own.bits, list(own.grids), own.group if isinstance(own.group, list) else [own.group])

    def untrainable(self) -> str | None:
        return "rounded stores only integers"

    def limit(self, group: list[Matrix]) -> int:
        return len(self.forms(group[0].shape[1]))

    def numbers(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        return 0  # numbers in the dtype of the weights; `index_bytes` counts everything

    def index_bytes(self, group: list[Matrix], size: int) -> int:
        m, n = group[0].shape
        return m * self.forms(n)[size - 1].row_bytes(n)

    def runs(self, group: list[Matrix], size: int, runtime: Runtime) -> bool:
        (m, n), form = group[0].shape, self.forms(group[0].shape[1])[size - 1]
        signed = form.bits + (form.grid == "asymmetric")  # bits of a code from which its zero point is subtracted
        if runtime == "torch":
            return form.group in KERNEL_GROUPS and m % KERNEL_ROWS == 0
        if runtime == "compressed-tensors":
            inside = math.gcd(form.group, n)
            whole = form.group == n
            return signed <= 8 and not group[0].transposed and (whole or inside in PACKED_GROUPS)
        if runtime == "gguf":
            blocks = n % 32 == 0 or group[0].role == "down_proj"  # whose inputs are filled up with zeros
            return signed <= 8 and blocks and (form.group % 32 == 0 or form.group == n)
        return super().runs(group, size, runtime)

    def work(self, group: list[Matrix], needs: tuple[str, ...]) -> tuple[float, float, float]:
        """Codes of all forms, several rounded at once; searched scales, errors, and feedback in a full metric."""
        (m, n), own = group[0].shape, self.options
        forms, both = self.forms(n), "gradient_gram" in needs
        at_once = min(len(forms), max(1, NUMBERS // (m * n)))
        tried = 1 + {"largest": 0, "searched": len(SHARES), "unbiased": len(FEW_BITS)}[own.scales]
        each = tried * (SCALES * m * n + CALLS) + PACKED * m * n + 2 * m * n * (n + (m if both else 0))
        batch = metric = 0.0
        if own.rounding == "feedback" and "gram" in needs:
            metric = n**3 + (m**3 if both else 0)
            if both:
                # Products for the error to nearest, the feedback and the slopes; then for the sweeps.
                each += BOTH * m * n + 5.25 * m * n * (m + n) + (2 * SWEEPS - 1) * m * n * n
                batch = STEP * (m + n) + SWEEPS * COLUMN * n
            else:
                each += GRAM * m * n + 3 * m * n * n
                batch = STEP * n / 2
        cached = m * sum(form.row_bytes(n) for form in forms)
        operations = metric + len(forms) * each + math.ceil(len(forms) / at_once) * batch
        return 8.0 * (MATRICES * at_once * m * n + 4 * n * n + 4 * m * m), 1.0 * operations, 1.0 * cached

    def fit(self, problem: Problem, largest: int) -> Fit:
        import torch

        from winnow.numerics.feedback import codes_of, metric_for
        from winnow.numerics.grids import scaled
        from winnow.numerics.linalg import weighted_error
        from winnow.numerics.rounding import multiplied, packed

        (weight,), name = problem.weights.values(), group_name(problem.group)
        columns, rows = self.metric_of_error(problem)
        metric = metric_for(columns, rows) if self.options.rounding == "feedback" else None
        diagonal = columns if columns.dim() == 1 else columns.diagonal() if metric is None else metric.columns.diagonal()
        stored: dict[str, Tensor] = {}
        errors = [weighted_error(weight, columns, rows)]
        every, at_once = self.forms(weight.shape[1]), max(1, NUMBERS // weight.numel())
        for forms in (every[begin : begin + at_once] for begin in range(0, len(every), at_once)):
            made = [scaled(weight, form, self.options.scales, diagonal) for form in forms]
            for form, (scales, zeros), codes in zip(
                forms, made, codes_of(weight, forms, made, metric, SWEEPS, name), strict=True
            ):
                size = len(errors)
                kept = multiplied(codes, scales.double(), form.group, zeros)
                errors.append(weighted_error(weight - kept, columns, rows))
                stored |= {f"{size}.steps": packed(codes - form.offset, form.bits), f"{size}.scale": scales.view(torch.int16)}
                if form.grid == "asymmetric":
                    stored[f"{size}.zero"] = packed(zeros - form.offset, form.bits)
        return Fit(stored, torch.stack(errors), errors[0].sqrt()[None])

    def predicted(self, problem: Problem, tensors: dict[str, Tensor]) -> Tensor:
        import torch

        from winnow.numerics.linalg import weighted_error
        from winnow.numerics.rounding import multiplied, unpacked

        ((name, weight),) = problem.weights.items()
        columns, rows = problem.sites[name]["gram"], problem.outputs[name]["gradient_gram"]
        errors = [weighted_error(weight, columns, rows)]
        for size, form in enumerate(self.forms(weight.shape[1]), start=1):
            steps = unpacked(tensors[f"{size}.steps"], weight.shape[1], form.bits).double()
            scales, zeros = tensors[f"{size}.scale"].view(torch.float16).double(), None
            if form.grid == "asymmetric":
                zeros = unpacked(tensors[f"{size}.zero"], scales.shape[1], form.bits).double()
            errors.append(weighted_error(weight - multiplied(steps, scales, form.group, zeros), columns, rows))
        return torch.stack(errors) / 2

    def layouts(self, group: list[Matrix], size: int) -> dict[str, dict[str, Any]]:
        m, n = group[0].shape
        form = self.forms(n)[size - 1]
        zeros = {"zeros": True} if form.grid == "asymmetric" else {}
        return {group[0].module: {"kind": self.kind(), "out": m, "in": n, "bits": form.bits, "group": form.group, **zeros}}

    def timed_sizes(self, group: list[Matrix], count: int) -> list[int]:
        return list(range(1, self.largest(group) + 1))  # forms that follow each other have little in common

    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        import torch

        ((module, layout),) = self.layouts(group, size).items()
        names = ["steps", "scale", *(["zero"] if "zeros" in layout else [])]
        own = {name: tensors[f"{size}.{name}"] for name in names}
        return {module: Part(layout, {**own, "weight": torch.empty(0)})}

    @staticmethod
    def module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        from winnow.numerics.modules import RoundedLinear, has_bias

        shape = (layout["in"], layout["out"], layout["bits"], layout["group"])
        return RoundedLinear(*shape, has_bias(dense), layout.get("zeros", False))
