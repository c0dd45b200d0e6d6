"""What the structures have in common that round a matrix to nearest in ways of their own."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo

from winnow.models.architectures import Matrix
from winnow.numerics.grids import Form
from winnow.numerics.operations import Operations
from winnow.structures.base import Fit, Part, Problem, Runtime, Structure, StructureOptions

if TYPE_CHECKING:
    from torch import Tensor


def _ascending(values: list[Any], info: ValidationInfo) -> list[Any]:
    if values != sorted(set(values)):
        raise ValueError(f"{info.field_name} must be in ascending order without duplicates: {sorted(set(values))}")
    return values


ASCENDING = AfterValidator(_ascending)
Bits = Annotated[list[Annotated[int, Field(ge=2, le=8)]], ASCENDING]


class RoundedForms(Structure):
    """A matrix in one of several forms of bits and a group, with zero points; size s is the s-th form by stored bytes."""

    predicts = True
    timed = True

    class Options(StructureOptions):
        bits: Bits = Field([4], min_length=1, description="bits of a number, 2 to 8, in ascending order; a size for each")
        group: int | None = Field(
            128, ge=4, description="inputs of a row that share a scale and a zero point; null: the whole row"
        )

    options: Options

    @abstractmethod
    def rounded(self, problem: Problem, form: Form) -> dict[str, Tensor]:
        """The stored tensors of the problem's matrix in a form."""

    @abstractmethod
    def matrix(self, tensors: dict[str, Tensor], form: Form, columns: int) -> Tensor:
        """(m, columns) float64: the matrix of these tensors."""

    @abstractmethod
    def form_bytes(self, form: Form, rows: int, columns: int) -> int:
        """Stored bytes of a matrix in a form."""

    def forms(self, columns: int) -> list[Form]:
        """The forms of sizes 1, 2, ... of a matrix with `columns` inputs."""
        return [Form(bits, "asymmetric", min(self.options.group or columns, columns)) for bits in self.options.bits]

    def untrainable(self) -> str | None:
        return f"{self.kind()} stores only codes and scales"

    def rounds(self) -> bool:
        return True

    def limit(self, group: list[Matrix]) -> int:
        return len(self.options.bits)

    def numbers(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        return 0  # numbers in the dtype of the weights; `index_bytes` counts everything

    def index_bytes(self, group: list[Matrix], size: int) -> int:
        m, n = group[0].shape
        return self.form_bytes(self.forms(n)[size - 1], m, n)

    def runs(self, group: list[Matrix], size: int, runtime: Runtime) -> bool:
        from winnow.structures.rounded import KERNEL_GROUPS, KERNEL_ROWS

        if runtime == "torch":
            return self.forms(group[0].shape[1])[size - 1].group in KERNEL_GROUPS and group[0].shape[0] % KERNEL_ROWS == 0
        return super().runs(group, size, runtime)

    def work(self, group: list[Matrix], needs: tuple[str, ...]) -> tuple[float, Operations, float]:
        """About 20 roundings of every form, each with its error."""
        m, n = group[0].shape
        each = 20.0 * (20 * m * n + 2 * m * n * (n + (m if "gradient_gram" in needs else 0)))
        cached = sum(self.form_bytes(form, m, n) for form in self.forms(n))
        operations = Operations(products=len(self.options.bits) * each)
        return 8.0 * (10 * m * n + 2 * n * n + 2 * m * m), operations, 1.0 * cached

    def fit(self, problem: Problem, largest: int) -> Fit:
        import torch

        from winnow.numerics.linalg import weighted_error

        (weight,), (columns, rows) = problem.weights.values(), self.metric_of_error(problem)
        errors = [weighted_error(weight, columns, rows)]
        stored: dict[str, Tensor] = {}
        for size, form in enumerate(self.forms(weight.shape[1]), start=1):
            made = self.rounded(problem, form)
            errors.append(weighted_error(weight - self.matrix(made, form, weight.shape[1]), columns, rows))
            stored |= {f"{size}.{name}": tensor for name, tensor in made.items()}
        return Fit(stored, torch.stack(errors), errors[0].sqrt()[None])

    def predicted(self, problem: Problem, tensors: dict[str, Tensor]) -> Tensor:
        import torch

        from winnow.numerics.linalg import weighted_error

        ((name, weight),) = problem.weights.items()
        grams = problem.sites[name]["gram"], problem.outputs[name]["gradient_gram"]
        errors = [weighted_error(weight, *grams)]
        for size, form in enumerate(self.forms(weight.shape[1]), start=1):
            errors.append(weighted_error(weight - self.matrix(self._own(tensors, size), form, weight.shape[1]), *grams))
        return torch.stack(errors) / 2

    @staticmethod
    def _own(tensors: dict[str, Tensor], size: int) -> dict[str, Tensor]:
        """The tensors of a size."""
        return {name.removeprefix(f"{size}."): tensor for name, tensor in tensors.items() if name.startswith(f"{size}.")}

    def layouts(self, group: list[Matrix], size: int) -> dict[str, dict[str, Any]]:
        (m, n), form = group[0].shape, self.forms(group[0].shape[1])[size - 1]
        return {group[0].module: {"kind": self.kind(), "out": m, "in": n, "bits": form.bits, "group": form.group}}

    def timed_sizes(self, group: list[Matrix], count: int) -> list[int]:
        return list(range(1, self.largest(group) + 1))

    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        import torch

        ((module, layout),) = self.layouts(group, size).items()
        return {module: Part(layout, {**self._own(tensors, size), "weight": torch.empty(0)})}
