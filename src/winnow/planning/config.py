"""The typed configuration: all options that change numbers. Source of the default YAML, the JSON schema and the key table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, create_model, model_validator

from winnow.allocation.base import ALLOCATIONS, AllocationOptions
from winnow.allocation.kinds.uniform import Uniform
from winnow.errors import InputError
from winnow.evaluation.base import EVALUATIONS, EvaluationOptions, with_kind
from winnow.evaluation.kinds.classification import Classification
from winnow.evaluation.kinds.perplexity import Perplexity
from winnow.metrics.base import METRICS, MetricOptions
from winnow.models.architectures import GRADIENTS, ROLES, TARGETS, Target, disjoint
from winnow.options import Name, Strict
from winnow.planning import presets
from winnow.planning.config_checks import check_allocations, check_exports, check_targets, check_training
from winnow.planning.config_errors import Located, described, nearest
from winnow.planning.config_inputs import Dtype, Model, Text
from winnow.planning.config_sources import Source, source_of
from winnow.planning.ranks import Ranks, Shares
from winnow.recovery.base import RECOVERIES, RecoveryOptions
from winnow.recovery.kinds.none import NoRecovery
from winnow.structures.base import STRUCTURES, StructureOptions
from winnow.structures.mixed import Mixed
from winnow.studies.base import STUDIES

if TYPE_CHECKING:
    AnyAllocation = AllocationOptions
    AnyMetric = MetricOptions
    AnyStructure = StructureOptions
    AnyRecovery = RecoveryOptions
    AnyEvaluation = EvaluationOptions
else:  # unions of what is registered, which a type checker cannot see
    AnyAllocation, AnyMetric, AnyStructure = ALLOCATIONS.union, METRICS.union, STRUCTURES.union
    AnyRecovery, AnyEvaluation = RECOVERIES.union, Annotated[EVALUATIONS.union, BeforeValidator(with_kind)]
_STUDIES: dict[str, Any] = {kind: (study.Options, study.Options()) for kind, study in STUDIES.items()}
OfStudies: Any = create_model("OfStudies", __base__=Strict, **_STUDIES)
UNIFORM = Uniform.Options(kind="uniform")


class Calibration(Strict):
    """The text on which statistics are collected; never an evaluation text."""

    text: Name | None = Field(None, description="name of a text; or use `task`")
    task: Name | None = Field(
        None,
        description="name of an evaluation of kind classification: every window is one of its train rows, tokenized as for the "
        "classifier with the task's `length`; padding is not counted",
    )
    windows: int = Field(128, ge=1, description="number of windows, sampled without replacement")
    length: int = Field(2048, ge=2, description="tokens per window")
    seed: int = Field(0, ge=0, description="seed of the sampling of windows")
    special_tokens: bool = Field(
        True, description="add the tokenizer's default special tokens (a BOS before the text, if it has one)"
    )
    first_token: bool = Field(True, description="count the first token of every window, whose activations are often massive")
    gradient_labels: Literal["model", "text"] = Field(
        "model", description="labels of the backward pass: sampled from the model (Fisher), or the text's (empirical Fisher)"
    )
    precision: Literal["float64", "float32"] = Field(
        "float64",
        description="dtype of products and stored moments; float32 halves the bytes, for wide models (sums are float64)",
    )


class Calibrations(Calibration):
    """A calibration, or with `seeds` one per seed, which results combine into one line."""

    seeds: list[Annotated[int, Field(ge=0)]] | None = Field(
        None,
        min_length=1,
        description="several seeds instead of `seed`, one calibration each; the tables have their spread",
    )

    @model_validator(mode="after")
    def _seed_or_seeds(self) -> Calibrations:
        if (self.text is None) == (self.task is None):
            raise ValueError("give either `text` or `task`")
        for key in ("length", "special_tokens", "gradient_labels") if self.task else ():
            if key in self.model_fields_set:
                raise ValueError(f"remove `{key}`: with `task` the rows are truncated and encoded as for the classifier")
        if self.seeds is not None and "seed" in self.model_fields_set:
            raise ValueError("give either `seed` or `seeds`")
        if self.seeds is not None and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("`seeds` has duplicates")
        return self

    def by_seed(self, name: str) -> dict[str, Calibration]:
        """The calibrations of this preset by name: itself, or `name.seed-0`, `name.seed-1`, ..."""
        content = self.model_dump(exclude={"seed", "seeds"})
        if self.seeds is None:
            return {name: Calibration(**content, seed=self.seed)}
        return {f"{name}.seed-{seed}": Calibration(**content, seed=seed) for seed in self.seeds}


class Method(Strict):
    """How matrices are replaced: a structure fitted in a metric."""

    paper: str | None = Field(None, description="publication, for tables; changes no number")
    structure: AnyStructure = Field(description="what is stored instead of a matrix")
    metric: AnyMetric | None = Field(
        None, description="error that the fit minimises; absent for structures that minimise the FFN's output error"
    )
    allocation: AnyAllocation | None = Field(
        None,
        description="how `keep_bytes` is distributed in budgets without an `allocation`; factors are shared with the same method "
        "without it",
    )

    @model_validator(mode="after")
    def _one_objective(self) -> Method:
        structure = STRUCTURES[self.structure.kind]
        if isinstance(self.structure, Mixed.Options) and self.metric is not None:
            self.members()
        if structure.objective == "metric" and self.metric is None:
            raise ValueError(f"{structure.kind()} needs a `metric`; {{kind: weights}} is the error of the weights")
        if structure.objective != "metric" and self.metric is not None:
            raise ValueError(f"{structure.kind()} minimises the error of the FFN's output; remove `metric`")
        if self.metric and not structure.weighs_outputs and set(METRICS[self.metric.kind].needs) & set(GRADIENTS):
            raise ValueError(f"{structure.kind()} cannot weight outputs, as {self.metric.kind} does; use a metric of the inputs")
        return self

    def members(self) -> list[Method]:
        """A method for each structure between which an allocation chooses, in this method's metric if it uses one."""
        found = STRUCTURES.build(self.structure.model_dump()).alternatives().values()
        return [
            Method(paper=None, structure=one.options, metric=self.metric if one.objective == "metric" else None, allocation=None)
            for one in found
        ]

    @property
    def objective(self) -> str:
        """The metric's kind, or what the structure minimises instead."""
        return self.metric.kind if self.metric else STRUCTURES[self.structure.kind].objective


class Budget(Strict):
    """How much of which matrices is kept. Exactly one of `keep_bytes`, `rank`, `rank_fraction`."""

    targets: list[Target] = Field(
        ["ffn"], min_length=1, description=", ".join(f"`{name}`" for name in TARGETS) + ", or roles: " + ", ".join(ROLES)
    )
    keep_bytes: float | None = Field(
        None, gt=0, le=1, description="stored over dense bytes of the chosen matrices, met within 0.5 %"
    )
    nearest: bool = Field(
        False,
        description="if `keep_bytes` cannot be met, as with structures of few sizes, store the nearest bytes that the allocation "
        "finds, which may be more, instead of an error; tables have the stored bytes",
    )
    rank: Ranks | None = Field(
        None, description="the same rank for every chosen matrix; or `{target: rank}` instead of `targets`"
    )
    rank_fraction: Shares | None = Field(
        None,
        description="rank as a share of the smaller side of each matrix (or of the structure's largest size); or "
        "`{target: share}` instead of `targets`",
    )
    allocation: AnyAllocation = Field(
        UNIFORM,
        description="how `keep_bytes` is distributed over the matrices, for methods without an `allocation`; kinds below",
    )

    @model_validator(mode="before")
    @classmethod
    def _by_target(cls, content: Any) -> Any:
        """Fills `targets` from ranks by target."""
        given = [content.get(key) for key in ("rank", "rank_fraction")] if isinstance(content, dict) else []
        for ranks in (value for value in given if isinstance(value, dict)):
            if set(content.get("targets", ranks)) != set(ranks):
                raise ValueError("ranks are given by target; remove `targets`")
            disjoint(ranks)
            content = {**content, "targets": list(ranks)}
        return content

    @model_validator(mode="after")
    def _one_currency(self) -> Budget:
        if sum(v is not None for v in (self.keep_bytes, self.rank, self.rank_fraction)) != 1:
            raise ValueError("give exactly one of `keep_bytes`, `rank`, `rank_fraction`")
        if self.keep_bytes is None and self.nearest:
            raise ValueError("nearest: is for `keep_bytes`; remove it")
        if self.keep_bytes is None and self.allocation != UNIFORM:
            raise ValueError(f"allocation: {self.allocation.kind} distributes bytes; give `keep_bytes`, or remove `allocation`")
        return self

    def spread_by(self, method: Method) -> Budget:
        """The budget with the method's allocation, if only the method has one; otherwise itself."""
        if method.allocation is None or self.keep_bytes is None or "allocation" in self.model_fields_set:
            return self
        return self.model_copy(update={"allocation": method.allocation})


class Experiment(Strict):
    """A grid: the product of the named presets. The dense model is always evaluated too."""

    models: list[Name] = Field(min_length=1)
    calibrations: list[Name] = Field(min_length=1)
    methods: list[Name] = Field(min_length=1)
    budgets: list[Name] = Field(min_length=1)
    recoveries: list[Name] = Field(
        ["none"], min_length=1, description="for every recovery but `none`, the dense model with the same recovery is added"
    )
    evaluations: list[Name] = Field(min_length=1)
    controls: bool = Field(
        True, description="for every method that selects neurons, columns or clusters, add the same with a random selection"
    )
    export: Literal["none", "dense"] = Field(
        "none", description="dense: also export every checkpoint as a dense model, for programs without winnow"
    )
    export_dtype: Literal["original", Dtype] = Field(
        "original", description="dtype of the tensors of exports; original: as in the dense model"
    )


class Config(Strict):
    """Presets by name, and the experiments that combine them."""

    models: dict[Name, Model] = Field(description="what is compressed")
    texts: dict[Name, Text] = Field(description="texts for calibration and evaluation")
    calibrations: dict[Name, Calibrations] = Field(description="data on which statistics are collected")
    methods: dict[Name, Method] = Field(
        {},
        description="points of the design space: structure x metric; those of the table below are known by name, "
        "and need not be defined here",
    )
    budgets: dict[Name, Budget] = Field(description="how much is kept, of which matrices")
    recoveries: dict[Name, AnyRecovery] = Field(
        {"none": NoRecovery.Options(kind="none")},
        description="steps after compression; those of the default configuration are known by name",
    )
    evaluations: dict[Name, AnyEvaluation] = Field(description="what is measured: loss, accuracy, latency")
    studies: OfStudies = Field(  # type: ignore[valid-type]
        OfStudies(), description="how much the studies of papers (`snakemake study_<name>`) measure; {study: {key: value}}"
    )
    experiments: dict[Name, Experiment] = Field(description="products of the names above; `snakemake` runs them all")

    @model_validator(mode="after")
    def _references(self) -> Config:
        if "dense" in self.methods:
            raise Located(
                ("methods", "dense"),
                "the name is reserved for the uncompressed model, which is always evaluated; rename the preset",
            )
        if "none" in self.recoveries and self.recoveries["none"].kind != "none":
            raise Located(("recoveries", "none"), "the name is reserved for no recovery; rename the preset")
        for section in ("calibrations", "evaluations"):
            for name, preset in getattr(self, section).items():
                if isinstance(preset, Calibration | Perplexity.Options) and preset.text is not None:
                    _known((section, name, "text"), preset.text, self.texts)
        for name in self.recoveries:
            self._check_steps(name)
        for where, task in self.tasks_named().items():
            _known(where, task, {n: e for n, e in self.evaluations.items() if isinstance(e, Classification.Options)})
        for name, experiment in self.experiments.items():
            for section in (s for s in Experiment.model_fields if not s.startswith(("controls", "export"))):
                for given in getattr(experiment, section):
                    _known(("experiments", name, section), given, getattr(self, section))
            for method in experiment.methods if experiment.export == "dense" else []:
                if reason := STRUCTURES.build(self.methods[method].structure.model_dump()).not_dense():
                    message = f"{method!r} cannot be exported as a dense model: {reason}"
                    raise Located(("experiments", name, "export"), message, ("methods", method))
            check_training(self, name, experiment)
            check_exports(self, name, experiment)
            check_allocations(self, name, experiment)
            check_targets(self, name, experiment)
            for c in experiment.calibrations:
                for e in experiment.evaluations:
                    evaluation, text = self.evaluations[e], self.calibrations[c].text
                    if not isinstance(evaluation, Perplexity.Options):
                        continue
                    if text is None:
                        raise Located(
                            ("experiments", name),
                            f"calibration {c!r} uses the rows of a task, which are not compared with the text of evaluation "
                            f"{e!r}; calibrate on a text",
                            ("calibrations", c),
                            ("evaluations", e),
                        )
                    if self.texts[text] == self.texts[evaluation.text]:
                        raise Located(
                            ("experiments", name),
                            f"calibration {c!r} and evaluation {e!r} read the same text; calibrate on a text that is not "
                            "evaluated",
                            ("calibrations", c),
                            ("evaluations", e),
                            ("texts", text),
                            ("texts", evaluation.text),
                        )
        return self

    def steps(self, recovery: str) -> list[str]:
        """The names of a recovery and of those that it continues (`after`), in order of execution."""
        after = self.recoveries[recovery].after
        return [*(self.steps(after) if after else []), recovery]

    def tasks_named(self) -> dict[tuple[str, ...], str]:
        """{place in the configuration: name of a task} for models, calibrations and recoveries."""
        found: dict[tuple[str, ...], str]
        found = {("models", n, "finetune", "task"): m.finetune.task for n, m in self.models.items() if m.finetune}
        for section in ("calibrations", "recoveries"):
            for name, preset in getattr(self, section).items():
                if task := getattr(preset, "task", None):
                    found[section, name, "task"] = task
        return found

    def _check_steps(self, name: str) -> None:
        """Raise ValueError for a recovery whose `after` names no recovery, or leads back to itself."""
        seen, step = [name], self.recoveries[name].after
        while step is not None:
            where = ("recoveries", seen[-1], "after")
            _known(where, step, {n: r for n, r in self.recoveries.items() if r.kind != "none"})
            if step in seen:
                message = f"{step!r} would follow itself; remove `after` from one of them"
                raise Located(where, message, *(("recoveries", one) for one in seen))
            seen.append(step)
            step = self.recoveries[step].after


def random_control(method: Method) -> Method | None:
    """The method with a random selection; None if it selects nothing, or already at random."""
    control = STRUCTURES.build(method.structure.model_dump()).control()
    return None if control is None else Method(paper=None, structure=control, metric=method.metric, allocation=method.allocation)


def _known(where: tuple[str, ...], name: str, valid: dict[str, Any]) -> None:
    if name not in valid:
        shipped = {"methods": presets.methods, "recoveries": presets.recoveries}.get(where[-1], dict)()
        raise Located(where, f"there is no {name!r}{nearest(name, {**valid, **shipped})}")


def load(config: dict[str, Any], parts: Sequence[Source] = ()) -> Config:
    """Validate a configuration merged from `parts`, with the presets that it names without defining them. Raises InputError, one
    line: file, key, what is wrong, nearest valid key."""
    config = presets.completed(config)
    try:
        return Config.model_validate(config)
    except ValidationError as error:
        places, message = described(error, config, Config)
        where = source_of(places, parts)
        raise InputError(": ".join(filter(None, [where, ".".join(places[0]), message]))) from error
