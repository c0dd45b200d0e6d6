"""Claims of the papers, and verdicts, which are computed from a claim's rule and measured numbers, never typed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from winnow.errors import InputError
from winnow.io.strict import read_yaml
from winnow.options import Strict

if TYPE_CHECKING:
    import pandas as pd

HOLDS, OTHER, FAILS = "holds", "holds with another number", "fails"
IMPOSSIBLE, UNTESTED, UNDECIDED = "impossible", "cannot be tested here", "undecided"
VERDICTS = (HOLDS, OTHER, FAILS, UNDECIDED, IMPOSSIBLE, UNTESTED)
ERRORS = 2  # standard errors that a difference must exceed
COARSE = 0.25  # share of the claimed number (or of its tolerance, if larger): with a larger error a claim is undecided
SMALL = 0.1  # share of the claimed number: less than that is not the claim with another number


class Number(Strict):
    """The claimed number is measured: it holds within `tolerance`, and with another number if only its sign agrees and the
    measured number is at least a tenth of it; with too large an error it is undecided."""

    kind: Literal["number"]
    tolerance: float = Field(ge=0, description="in the claim's unit; two standard errors of the measurement are added")
    side: Literal["above", "below"] | None = Field(None, description="side of 0 that the claim states even with another number")


class Bound(Strict):
    """The measured number must be at least or at most a bound; within two standard errors of the bound it is undecided."""

    kind: Literal["bound"]
    least: float | None = None
    most: float | None = None


class Reachable(Strict):
    """Arithmetic: the claimed number must lie between the measured smallest and largest possible ones."""

    kind: Literal["reachable"]
    tolerance: float = Field(0.0, ge=0)


class Untestable(Strict):
    """It cannot be tested here, as something is missing."""

    kind: Literal["untestable"]
    reason: str


class Claim(Strict):
    """One quantitative claim."""

    id: str = Field(pattern=r"^[a-z0-9_]+$")
    study: str = Field(description="the study whose measurement answers it")
    where: str = Field(description="place in the paper")
    says: str = Field(description="the claim, in a sentence")
    number: float | None = Field(None, description="the claimed number")
    unit: str = ""
    measured: str = Field(description="what is measured to answer it")
    differs: str = Field("", description="why the paper's number can differ from ours")
    check: Annotated[Number | Bound | Reachable | Untestable, Field(discriminator="kind")]


@dataclass(frozen=True)
class Answer:
    """The measurement for a claim on a model: a number with its standard error (0: exact arithmetic or a deterministic fit), or
    the possible range; `missing`: why there is neither."""

    value: float | None = None
    error: float = 0.0
    low: float | None = None
    high: float | None = None
    missing: str = ""


def read_claims(path: Path | str) -> list[Claim]:
    """The claims of a file. Raises InputError, with the claim and the key, for an incomplete or duplicate claim."""
    try:
        claims = TypeAdapter(list[Claim]).validate_python(read_yaml(Path(path).read_text(encoding="utf-8"), str(path)))
    except ValidationError as error:
        raise InputError(f"{path}: {error}") from error
    names = [claim.id for claim in claims]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path}: duplicate claim {twice[0]}; remove one of them")
    return claims


def read_claims_of(specs: list[dict[str, Any]]) -> list[Claim]:
    """Claims from a job's params."""
    return TypeAdapter(list[Claim]).validate_python(specs)


def verdict(claim: Claim, answer: Answer) -> str:
    """One of the six words. Raises InputError if the answer is of another kind than the claim's rule."""
    check = claim.check
    if isinstance(check, Untestable) or answer.missing:
        return UNTESTED
    if isinstance(check, Reachable):
        if answer.low is None or answer.high is None or claim.number is None:
            raise InputError(f"{claim.id}: its rule needs a possible range and a claimed number")
        return HOLDS if answer.low - check.tolerance <= claim.number <= answer.high + check.tolerance else IMPOSSIBLE
    if answer.value is None:
        raise InputError(f"{claim.id}: its rule needs a measured number")
    margin = ERRORS * answer.error
    if isinstance(check, Bound):
        above = [] if check.least is None else [answer.value - check.least]
        room = [*above, *([] if check.most is None else [check.most - answer.value])]
        if min(room) >= (margin if margin else 0.0):
            return HOLDS
        return FAILS if min(room) < -margin else UNDECIDED
    claimed = claim.number or 0.0
    if claim.number is not None and abs(answer.value - claimed) <= check.tolerance + margin:
        return HOLDS if margin <= max(check.tolerance, COARSE * abs(claimed)) else UNDECIDED
    if check.side is None:
        return FAILS
    signed, least = (answer.value if check.side == "above" else -answer.value), SMALL * abs(claimed)
    if signed > margin and signed >= least:
        return OTHER
    return FAILS if signed < max(least - margin, -margin) or not margin else UNDECIDED


def judge(claims: Iterable[Claim], answers: dict[str, dict[str, Answer]]) -> pd.DataFrame:
    """One row per claim and model, from {claim: {model: answer}}. Raises InputError for a claim without an answer."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for claim in claims:
        given = answers.get(claim.id, {})
        if isinstance(claim.check, Untestable):
            given = {"any": Answer(missing=claim.check.reason)}
        if not given:
            raise InputError(f"{claim.id}: the study has no answer")
        for model, answer in given.items():
            own = claim.model_dump(exclude={"check"})
            rows.append({**own, "model": model, **asdict(answer), "verdict": verdict(claim, answer)})
    return pd.DataFrame(rows)
