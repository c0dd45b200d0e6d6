"""Labels, cells and fingerprints: what moves a path, what reruns a stage, and what does neither."""

import shutil

import pytest

from tests.conftest import ROOT, plain
from tests.unit.test_structures import metrics_of
from winnow.errors import InputError
from winnow.planning.config import load
from winnow.planning.config_files import default
from winnow.planning.fingerprints import CodeTracker
from winnow.planning.plan import Plan
from winnow.planning.stages.base import stages_of
from winnow.structures.base import STRUCTURES

TIMED = {"kind": "ilp", "time": {"keep": 0.9}}


def plan_of(change=lambda c: None, root=ROOT, memory=None):
    config = plain()
    config["evaluations"]["tasks"] = {"kind": "accuracy", "tasks": ["hellaswag"]}
    config["evaluations"]["times"] = {"kind": "latency"}
    config["evaluations"]["reviews"] = {"kind": "classification", "train": ["a.csv"], "test": ["b.csv"], "columns": ["text"]}
    config["models"]["tuned"] = {"source": "resources/models/demo", "finetune": {"task": "reviews"}}
    config["calibrations"]["rows"] = {"task": "reviews"}
    config["budgets"]["timed"] = {"targets": ["ffn"], "keep_bytes": 0.8, "allocation": TIMED}
    config["recoveries"]["again"] = {"kind": "finetune", "task": "reviews"}
    change(config)
    return Plan(load(config), root, memory)


def test_the_default_is_four_methods_by_eight_budgets_and_dense():
    plan = plan_of()
    assert sum(cell.method is None for cell in plan.cells) == 1
    assert len(plan.cells) == 1 + 4 * 8
    assert len({plan.paths.result(cell) for cell in plan.cells}) == len(plan.cells)


def test_a_label_depends_on_its_own_content_only():
    before = plan_of().labels
    after = plan_of(lambda c: c["budgets"]["ffn-0.8"].update(keep_bytes=0.7)).labels
    changed = {(s, n) for s in before for n in before[s] if before[s][n] != after[s][n]}
    assert {("budgets", "ffn-0.8")} < changed
    assert all(section == "budgets" and name.startswith("ffn-0.8") for section, name in changed)  # as spread, too
    after = plan_of(lambda c: c["texts"]["demo_calibration"].update(stop=3)).labels
    changed = {(s, n) for s in before for n in before[s] if before[s][n] != after[s][n]}
    assert changed == {("texts", "demo_calibration"), ("calibrations", "demo")}


def test_defaults_order_and_execution_move_nothing():
    before = plan_of()

    def change(c):
        c["models"]["demo"].update(dtype="float32", shards=4, load="stream")
        c["methods"] = dict(reversed(c["methods"].items()))
        c["budgets"]["ffn-0.8"] = dict(reversed(c["budgets"]["ffn-0.8"].items()))

    after = plan_of(change)
    assert before.labels == after.labels
    assert len(after.shards(after.labels["models"]["demo"])) == 4


def test_every_kind_has_a_label_of_its_own():
    """A default `kind` would drop out of the hash, and other methods would overwrite each other's results."""
    labels = set()
    pairs = [(s, m) for s in STRUCTURES for m in metrics_of({"kind": s})]
    for structure, metric in pairs:
        method = {"structure": {"kind": structure}} | ({"metric": {"kind": metric}} if metric else {})
        plan = plan_of(lambda c, method=method: c["methods"].update(same=method))
        labels.add(plan.labels["methods"]["same"])
    assert len(labels) == len(pairs)


def test_evaluations_of_other_kinds_stand_beside_the_old_ones_and_move_none():
    before = plan_of()

    def change(c):
        c["evaluations"]["demo"]["kind"] = "perplexity"
        c["evaluations"]["tasks.1"] = {"kind": "accuracy", "tasks": ["x"]}
        c["evaluations"]["speed"] = {"kind": "latency"}
        c["experiments"]["demo"]["evaluations"] += ["tasks.1", "speed"]

    after = plan_of(change)
    labels = after.labels["evaluations"]
    assert labels["demo"] == before.labels["evaluations"]["demo"] == "demo-299c6a"  # of results that people have
    assert after.cells.of("perplexity") == list(before.cells)
    for kind, name in (("accuracy", "tasks.1"), ("latency", "speed")):
        cells = after.cells.of(kind)
        assert len(cells) == 33
        assert {cell.evaluation for cell in cells} == {name}
        assert sum(cell.method is None for cell in cells) == 1
        assert not set(after.cells.texts_of(cells[0]))
        assert after.cells.texts_of(cells[-1]) == ["demo_calibration"]
        assert after.pattern("evaluations", kind=kind).split("|")[-1] == labels[name].replace(".", r"\.")
    assert after.pattern("calibrations", "evaluations", kind="perplexity").split("|")[2:] == [labels["demo"]]
    assert Plan(load(default()), ROOT).pattern("evaluations", kind="latency") == "none"
    for stage in ("tables", "report"):
        assert after.spec(stage, {}) == before.spec(stage, {})


def test_a_calibration_and_an_evaluation_never_share_a_label():
    def change(c):
        c["calibrations"]["w"] = {"text": "demo_calibration", "length": 64}
        c["evaluations"]["w"] = {"text": "demo_calibration", "length": 64}

    labels = plan_of(change).labels
    assert labels["calibrations"]["w"] != labels["evaluations"]["w"]


def test_swapped_values_are_a_change_for_snakemake():
    """It compares the set of the values' representations; one dict per stage keeps the names in them."""
    seen = set()
    for windows, length in ((256, 128), (128, 256)):
        plan = plan_of(lambda c, w=windows, n=length: c["calibrations"]["demo"].update(windows=w, length=n))
        wildcards = {"model": plan.labels["models"]["demo"], "windows": plan.labels["calibrations"]["demo"]}
        seen.add(frozenset({repr(plan.spec("tokenize", wildcards)), repr(plan.versions("tokenize", wildcards))}))
    assert len(seen) == 2


UPSTREAM = ("model", "calibration", "method", "budget", "recovery")
WILDCARDS = {  # of the rules
    "dequantize": ("model",),
    "retrieve_model": ("model",),
    "retrieve_text": ("text",),
    "check_overlap": ("text", "other"),
    "retrieve_base": ("model",),
    "finetune": ("model",),
    "retrieve_examples": ("task",),
    "tokenize": ("model", "windows"),
    "tokenize_rows": ("model", "windows"),
    "collect_statistics": ("model", "calibration"),
    "collect_gradients": ("model", "calibration"),
    "merge_statistics": ("model", "calibration"),
    "merge_gradients": ("model", "calibration"),
    "collect_outer": ("model", "calibration"),
    "assign_clusters": ("model", "calibration", "clustering"),
    "factorize": ("model", "calibration", "method", "shard"),
    "measure_spectra": ("model", "calibration", "method"),
    "predict_losses": ("model", "calibration", "method"),
    "time_forms": ("model", "timing"),
    "predict_in_rounds": UPSTREAM[:4],
    "learn_sizes": UPSTREAM[:4],
    "compress": UPSTREAM[:4],
    "recover": UPSTREAM,
    "export_dense": UPSTREAM[:4],
    "evaluate_perplexity": (*UPSTREAM, "evaluation"),
    "retrieve_tasks": ("evaluation",),
    "evaluate_accuracy": (*UPSTREAM, "evaluation"),
    "tabulate_accuracy": (),
    "evaluate_latency": (*UPSTREAM, "evaluation"),
    "tabulate_latency": (),
    "evaluate_classification": (*UPSTREAM, "evaluation"),
    "tabulate_classification": (),
    "cards": (),
    "tables": (),
    "figures": (),
    "report": (),
    "measure_study": ("model", "calibration", "study"),
    "conclude_study": ("study",),
    "studies": (),
    "demo_texts": (),
    "demo_model": (),
}


STAGES = list(stages_of(plan_of()))  # names
OF_TASKS = {"retrieve_tasks", "evaluate_accuracy"}
EVALUATED = dict.fromkeys(OF_TASKS, "tasks") | {"evaluate_latency": "times", "evaluate_classification": "reviews"}  # else `demo`


def wildcards_of(plan, stage):
    labels = plan.labels
    values = {
        "model": labels["models"]["tuned" if stage == "finetune" else "demo"],
        "task": plan.task_label("reviews"),
        "text": labels["texts"]["demo_calibration"],
        "other": labels["texts"]["demo_evaluation"],
        "windows": labels["calibrations"]["rows" if stage == "tokenize_rows" else "demo"],
        "calibration": labels["calibrations"]["demo"],
        "method": labels["methods"]["asvd"],
        "shard": "1-of-1",
        "timing": plan.timing_label(labels["methods"]["asvd"], labels["budgets"]["timed"]),
        "study": "coupling",
        "clustering": plan.clustering_label(labels["methods"]["clusters_cosine"]),
        "budget": labels["budgets"]["ffn-0.8"],
        "recovery": labels["recoveries"]["refine" if stage == "recover" else "none"],
        "evaluation": labels["evaluations"][EVALUATED.get(stage, "demo")],
    }
    return {name: values[name] for name in WILDCARDS[stage]}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_builtin_params_a_script_and_versions(stage, memory):
    plan = plan_of(memory=memory)
    spec, code = plan.spec(stage, wildcards_of(plan, stage)), plan.fingerprint(stage, wildcards_of(plan, stage))
    assert code[0] == sorted(code)[0]
    assert any(line.startswith(f"{plan.stages[stage].kind()}.py ") for line in code)
    assert set(plan.versions(stage, wildcards_of(plan, stage))) == set(plan.stages[stage].libraries)
    stack = [spec]
    while stack:
        value = stack.pop()
        assert type(value) in (dict, list, str, int, float, bool, type(None))
        stack += list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """Digests of files as they are, so that a test parses only what it edits."""
    return tmp_path_factory.mktemp("digests")


@pytest.fixture
def checkout(tmp_path):
    for folder in ("src", "scripts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return tmp_path


def fingerprints(checkout, memory):
    plan = plan_of(root=checkout, memory=memory)
    return {stage: plan.fingerprint(stage, wildcards_of(plan, stage)) for stage in STAGES}


def stages_changed(checkout, memory, file, old, new):
    """The stages whose fingerprint an edit changes."""
    before = fingerprints(checkout, memory)
    path = checkout / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    after = fingerprints(checkout, memory)
    return {stage for stage in STAGES if before[stage] != after[stage]}


EVALUATIONS = {"evaluate_perplexity", "evaluate_accuracy", "evaluate_classification"}
OF_METHODS = {
    "factorize",
    "measure_spectra",
    "predict_losses",
    "predict_in_rounds",
    "learn_sizes",
    "compress",
    "recover",
    "export_dense",
    *EVALUATIONS,
    "evaluate_latency",
    "time_forms",
}  # they reach the structure's file
ALLOCATING = {"compress", "predict_in_rounds", "learn_sizes"}
TIMING = {"evaluate_latency", "time_forms"}
STUDY = {"measure_study", "conclude_study"}  # here of coupling
OF_SCORES = {"tabulate_classification", "conclude_study"}
MODELS = {
    "predict_in_rounds",
    "learn_sizes",
    "collect_statistics",
    "collect_gradients",
    "collect_outer",
    "recover",
    *EVALUATIONS,
    "evaluate_latency",
}  # they run one
LOADERS = MODELS | {"export_dense", "merge_statistics", "merge_gradients"}
NAMES = LOADERS | {"retrieve_model", "retrieve_base"}
REFITTING = {"factorize", "compress", "learn_sizes"}  # which predict losses of factors without tensors, or fit them again
EDITS = [
    ("src/winnow/numerics/linalg.py", "m, n = weight.shape", "m, n = weight.shape  # a comment", set()),
    ("src/winnow/numerics/linalg.py", '"""Directions that minimise', '"""Other words that solve', set()),
    ("src/winnow/numerics/linalg.py", "return (vectors * values", "return  (\n        vectors * values", set()),
    ("src/winnow/numerics/linalg.py", "clamp(min=0).sqrt()) @", "clamp(min=1e-9).sqrt()) @", OF_METHODS | STUDY),
    (
        "src/winnow/calibration/statistics.py",
        "mean_of(self.gram, n, self.precision)",
        "mean_of(self.gram, n - 1, self.precision)",
        {"collect_statistics", "merge_statistics", "predict_in_rounds"},
    ),
    ("src/winnow/allocation/groups.py", "TOLERANCE = 0.005", "TOLERANCE = 0.004", ALLOCATING),
    ("src/winnow/allocation/kinds/uniform.py", "max(1, step(g))", "max(2, step(g))", ALLOCATING),  # of the budget's own kind
    ("src/winnow/allocation/kinds/greedy.py", "heapq.heapify(heap)", "heap.sort()", set()),  # of another one
    ("src/winnow/allocation/masks.py", "SURE = 3.0", "SURE = 2.0", {"learn_sizes"}),
    ("src/winnow/recovery/training.py", "betas=(0.9, 0.95)", "betas=(0.9, 0.99)", {"learn_sizes", "recover"}),
    ("src/winnow/factors/predict.py", "[: len(fit", "[: 1 * len(fit", {"predict_losses", "predict_in_rounds", *REFITTING}),
    (
        "src/winnow/evaluation/perplexity.py",
        "STREAMED = 1 << 21",
        "STREAMED = 1 << 20",
        {"evaluate_perplexity", "predict_in_rounds"},
    ),
    (
        "src/winnow/evaluation/spread.py",
        "n / (n - 1)",
        "n / n",
        {*EVALUATIONS, "predict_in_rounds", "tables", "figures", "report", "tabulate_classification", *STUDY},
    ),
    ("src/winnow/checkpoint/export.py", "COLUMNS = 1024", "COLUMNS = 512", {"export_dense", "evaluate_latency"}),  # in llama.cpp
    ("src/winnow/recovery/refine.py", "skipped = 0 if", "skipped = 2 if", {"recover"}),
    ("src/winnow/recovery/distill.py", "lora_dropout=0.0", "lora_dropout=0.1", set()),  # of another kind
    ("src/winnow/recovery/kinds/distill.py", "lora_rank: int = Field(8", "lora_rank: int = Field(9", set()),
    ("src/winnow/recovery/base.py", "steps: int = Field(200", "steps: int = Field(100", {"recover"}),
    (
        "src/winnow/checkpoint/card.py",
        "Needs winnow",
        "It needs winnow",
        {"compress", "predict_in_rounds", "export_dense", "cards", "evaluate_latency"},  # of the export to llama.cpp
    ),
    ("src/winnow/reporting/tables.py", '"kl": 0.0', '"kl": 0.1', {"tables", "conclude_study"}),
    (
        "src/winnow/data/tokens.py",
        "PAD = -1",
        "PAD = -2",
        {"tokenize", "tokenize_rows", "finetune", "predict_in_rounds", *EVALUATIONS},
    ),
    ("src/winnow/evaluation/accuracy.py", "return found if", "return found and found if", {"evaluate_accuracy"}),
    ("src/winnow/data/tasks.py", "not any(is_group", "all(not is_group", OF_TASKS),
    ("src/winnow/evaluation/accuracy_table.py", '"delta": 0.0', '"delta": 0.1', {"tabulate_accuracy", *OF_SCORES}),
    ("src/winnow/data/rows.py", "row {bad}: there", "row {bad}, there", {"retrieve_examples", "check_overlap"}),
    ("src/winnow/data/examples.py", "padding=False", "padding=True", {"tokenize_rows", "finetune", "evaluate_classification"}),
    ("src/winnow/training/finetune.py", "EPS, BETAS = 1e-8", "EPS, BETAS = 1e-7", {"finetune"}),  # and of a recovery of that kind
    ("src/winnow/training/options.py", "rate: float = Field(3e-5", "rate: float = Field(2e-5", {"finetune"}),
    (
        "src/winnow/evaluation/classification.py",
        "return 2 * right",
        "return 3 * right",
        {"evaluate_classification", *OF_SCORES},
    ),
    ("src/winnow/engines/workers/run_vllm.py", 'request["new"] + 1', 'request["new"] + 2', {"evaluate_latency"}),
    ("src/winnow/evaluation/latency.py", "SLOT = 0.01", "SLOT = 0.02", TIMING),
    ("src/winnow/allocation/time_forms.py", "COLD = 1 << 28", "COLD = 1 << 27", {"time_forms"}),
    ("src/winnow/allocation/times.py", "of_dense) * seconds)", "of_dense) * (seconds))", set()),
    (
        "src/winnow/allocation/times.py",
        'bias"]): row["seconds"]',
        'bias"]): 1 * row["seconds"]',
        {*ALLOCATING, "time_forms"} - {"learn_sizes"},
    ),
    ("src/winnow/evaluation/latency_table.py", 'f"control_{key}"', 'f"dense_{key}"', {"tabulate_latency"}),
    ("src/winnow/io/artifacts.py", 'MANIFEST = "manifest.json"', 'MANIFEST = "content.json"', set(STAGES)),
    ("src/winnow/metrics/mean_abs.py", "pow(2 * self", "pow(3 * self", {"factorize"}),  # of the method's own metric
    ("src/winnow/metrics/two_sided.py", 'return site["gram"]', 'return 2 * site["gram"]', set()),  # of another one
    ("src/winnow/numerics/modules.py", "self.left(self.right(x))", "self.left(self.right(1 * x))", OF_METHODS),
    (
        "src/winnow/checkpoint/hf.py",
        "requires_calibration = True",
        "requires_calibration = False",
        LOADERS,
    ),
    ("src/winnow/models/naming.py", "elif name in found", "elif name in set(found)", NAMES),
    ("src/winnow/calibration/clusters.py", "n_init=5", "n_init=6", {"assign_clusters"}),
    (
        "src/winnow/calibration/gradients.py",
        "mean_of(self.gram, self.count, self.precision)",
        "mean_of(self.gram, self.count + 1, self.precision)",
        {"collect_gradients", "collect_outer", "merge_gradients", "predict_in_rounds"},
    ),
    ("src/winnow/numerics/coupling.py", "import annotations", "import annotations\n\nx = 1", STUDY),  # of another structure
    ("scripts/factorize.py", "names.append(name)", "names.append(str(name))", {"factorize"}),
]


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"), EDITS, ids=[f"{f.split('/')[-1]}-{i}" for i, (f, *_) in enumerate(EDITS)]
)
def test_an_edit_changes_exactly_the_stages_that_reach_it(checkout, memory, file, old, new, expected):
    assert stages_changed(checkout, memory, file, old, new) == expected


def test_a_structure_belongs_to_the_methods_that_use_it(checkout, memory):
    file, old = "src/winnow/structures/low_rank.py", "return size * sum(group[0].shape)"
    stages = stages_changed(checkout, memory, file, old, "return 1 * size * sum(group[0].shape)")
    assert stages == OF_METHODS


def test_fingerprints_do_not_depend_on_the_folder(checkout):
    here, there = CodeTracker(ROOT), CodeTracker(checkout)
    assert all(here.fingerprint(path.name) == there.fingerprint(path.name) for path in (ROOT / "scripts").glob("*.py"))


def test_missing_sources_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plan_of().cells.check_sources()
    with pytest.raises(InputError, match="nowhere: there is no such model directory"):
        plan_of(lambda c: c["models"]["demo"].update(source="nowhere")).cells.check_sources()
    with pytest.raises(InputError, match=r"texts\.demo_evaluation\.files: gone\.txt"):
        plan_of(lambda c: c["texts"]["demo_evaluation"].update(files=["gone.txt"])).cells.check_sources()


def test_a_random_control_stands_beside_every_selection():
    def change(c):
        methods = ["svd", "ffsplit", "clusters_norm", "clusters_cosine", "modegpt_mlp"]
        c["experiments"]["demo"] |= {"methods": methods, "budgets": ["ffn-0.8", "ffn-0.4"]}

    methods = {cell.method for cell in plan_of(change).cells}
    own = {"svd", "ffsplit", "clusters_norm", "clusters_cosine", "modegpt_mlp"}
    assert methods == own | {None, "ffsplit.random", "modegpt_mlp.random", "clusters_random"}, (
        "a preset of the same content serves"
    )
    plan = plan_of(change)
    controls = plan.controls
    assert plan.methods[controls["ffsplit"]].structure.criterion == "random"
    reversed_plan = plan_of(lambda c: (change(c), c.update(methods=dict(reversed(c["methods"].items())))))
    assert reversed_plan.controls == controls

    def without(c):
        change(c)
        c["experiments"]["demo"]["controls"] = False

    assert {cell.method for cell in plan_of(without).cells} == own | {None}


def test_a_preset_cannot_pass_for_a_control():
    with pytest.raises(InputError, match=r"methods\.ffsplit\.random: the name is taken by the random control of 'ffsplit'"):
        plan_of(lambda c: c["methods"].update({"ffsplit.random": c["methods"]["svd"]}))


def test_a_method_spreads_the_budgets_that_do_not_say_how():
    def change(c):
        c["budgets"]["asked"] = {"targets": ["ffn"], "keep_bytes": 0.8, "allocation": {"kind": "uniform"}}
        c["budgets"]["ranks"] = {"targets": ["ffn"], "rank": 8}
        c["experiments"]["demo"].update(methods=["whitened", "svd_llm_v2", "whitened_ilp"], budgets=["ffn-0.8", "asked", "ranks"])

    plan = plan_of(change)
    rows = [plan.row(cell) for cell in plan.cells if cell.method]
    kinds = {(row["method"], row["budget"]): row["allocation"] for row in rows}
    assert kinds == {
        (m, b): "uniform" for m in ("whitened", "svd_llm_v2", "whitened_ilp") for b in ("ffn-0.8", "asked", "ranks")
    } | {
        ("svd_llm_v2", "ffn-0.8"): "per_type",
        ("whitened_ilp", "ffn-0.8"): "ilp",
    }
    names, budgets = plan.labels["methods"], plan.labels["budgets"]
    factors = plan.paths.of_members("m", "c", names["svd_llm_v2"], "spectra.parquet")
    assert factors == plan.paths.of_members("m", "c", names["whitened"], "spectra.parquet"), (
        "its factors are those of the metric alone"
    )
    (cell,) = (c for c in plan.cells if c.method == "svd_llm_v2" and plan.budget_name(str(c.budget)) == "ffn-0.8")
    label = budgets[str(cell.budget)]
    assert label.startswith("ffn-0.8-")
    assert label != budgets["ffn-0.8"]
    spec = plan.spec(
        "compress",
        {"model": plan.labels["models"]["demo"], "calibration": plan.labels["calibrations"]["demo"]}
        | {"method": names["svd_llm_v2"], "budget": label},
    )
    assert spec["names"]["budget"] == "ffn-0.8"
    assert spec["presets"]["budget"]["allocation"] == {"kind": "per_type", "smallest": 8.0}
    assert spec["allocation"]["version"] == 2, "checkpoints of the first version are compressed anew"
    other = plan_of(lambda c: (change(c), c["methods"]["svd_llm_v2"].update(allocation={"kind": "energy"})))
    assert other.paths.result(next(c for c in other.cells if c.method == "svd_llm_v2")) != plan.paths.result(cell)


def test_a_preset_cannot_pass_for_a_budget_that_a_method_spreads():
    with pytest.raises(InputError, match=r"budgets\.ffn-0\.8\.winnow: the name is taken by 'ffn-0\.8' as 'winnow' spreads it"):
        plan_of(lambda c: c["budgets"].update({"ffn-0.8.winnow": c["budgets"]["ffn-0.8"]}))


def test_methods_that_cluster_alike_share_the_clusters():
    plan = plan_of(lambda c: c["methods"].update(other=c["methods"]["clusters_cosine"] | {"metric": {"kind": "gram"}}))
    labels = plan.labels["methods"]
    assert plan.clustering_label(labels["other"]) == plan.clustering_label(labels["clusters_cosine"])
    assert plan.clustering_label(labels["clusters_norm"]) != plan.clustering_label(labels["clusters_cosine"])
    assert plan.clustering_label(labels["svd"]) is None
    assert plan.needs(labels["other"]) == {"moments", "clusters"}
    assert plan.needs(labels["kfac"]) == {"moments", "gradients"}
    assert plan.needs(labels["svd"]) == set()


def test_a_paper_names_nothing():
    before = plan_of()
    after = plan_of(lambda c: c["methods"]["svd"].update(paper="another"))
    assert before.labels == after.labels
    wildcards = wildcards_of(before, "compress") | {"method": before.labels["methods"]["svd"]}
    assert before.spec("compress", wildcards) == after.spec("compress", wildcards)


def test_a_dense_export_is_asked_for_by_name_and_moves_nothing_else():
    before = plan_of()
    assert before.cells.exported() == []

    def change(c):
        c["experiments"]["demo"] |= {"export": "dense", "methods": ["svd", "ffsplit"], "budgets": ["ffn-0.8", "ffn-0.4"]}

    after = plan_of(change)
    assert after.labels == before.labels
    assert {cell.method for cell in after.cells.exported()} == {"svd", "ffsplit"}, "random controls are compared, not handed on"
    assert "ffsplit.random" in {cell.method for cell in after.cells}
    assert set(after.cells.exported()) < set(after.cells)
    seeded = plan_of(lambda c: (change(c), c["calibrations"]["demo"].update(seeds=[0, 1])))
    assert {cell.calibration for cell in seeded.cells.exported()} == {"demo.seed-0", "demo.seed-1"}
    with pytest.raises(InputError, match=r"experiments\.demo\.export: 'r2lin' cannot be exported as a dense model: affine_block"):
        plan_of(lambda c: c["experiments"]["demo"].update(export="dense", methods=["svd", "r2lin"]))


def test_a_dense_export_is_in_the_dtype_that_its_experiment_says():
    def change(c):
        c["experiments"]["demo"] |= {"export": "dense", "methods": ["svd"], "budgets": ["ffn-0.8"], "export_dtype": "bfloat16"}
        c["experiments"]["more"] = {**c["experiments"]["demo"], "methods": ["asvd"], "export_dtype": "original"}

    plan = plan_of(change)
    found = {w.split("/")[3].partition("-")[0]: dtype for w, dtype in plan.export_dtypes.items()}
    assert found == {"svd": "bfloat16", "asvd": "original"}
    wildcards = wildcards_of(plan, "export_dense")
    for name, dtype in found.items():
        w = wildcards | {"method": plan.labels["methods"][name], "budget": plan.labels["budgets"]["ffn-0.8"]}
        assert plan.spec("export_dense", w) == {"dtype": dtype}
    assert plan.spec("export_dense", w | {"budget": plan.labels["budgets"]["ffn-0.4"]}) == {"dtype": "original"}, "not asked for"
    assert plan.labels == plan_of().labels
    message = r"experiments\.\w+\.export_dtype: '\w+' exports the same checkpoints in (bfloat16|original), not (original|bfl)"
    with pytest.raises(InputError, match=message):
        plan_of(lambda c: (change(c), c["experiments"]["more"].update(methods=["svd", "asvd"])))


def test_a_card_has_every_evaluation_of_its_checkpoint():
    def change(c):
        c["evaluations"]["other"] = {**c["evaluations"]["demo"], "length": 64}
        c["experiments"]["demo"]["evaluations"] = ["demo", "other"]

    plan = plan_of(change)
    cards = plan.spec("cards", {})["cards"]
    assert len(cards) == 4 * 8
    results = {path for of in cards.values() for made in of["evaluations"].values() for path in made.values()}
    assert results == {plan.paths.result(cell) for cell in plan.cells}
    for path, of in cards.items():
        assert list(of["evaluations"]) == ["demo", "other"]
        assert of["checkpoint"].startswith(path.rsplit("/", 2)[0] + "/checkpoint/")


def seeds(*values):
    return lambda c: c["calibrations"]["demo"].update(seeds=list(values))


def test_seeds_are_calibrations_with_the_labels_of_single_ones():
    labels = plan_of(seeds(0, 1, 7)).labels["calibrations"]
    assert [name for name in labels if name != "rows"] == ["demo.seed-0", "demo.seed-1", "demo.seed-7"]
    for seed in (0, 1, 7):
        single = plan_of(lambda c, seed=seed: c["calibrations"]["demo"].update(seed=seed))
        listed = plan_of(seeds(0, 1, 7))
        assert labels[f"demo.seed-{seed}"] == single.labels["calibrations"]["demo"]
        wildcards = wildcards_of(single, "compress")
        for stage in ("tokenize", "collect_statistics", "collect_gradients", "factorize", "compress"):
            own = {key: wildcards_of(single, stage)[key] for key in WILDCARDS[stage]}
            assert listed.spec(stage, own) == single.spec(stage, own), (stage, wildcards)


def test_cells_and_tables_run_over_the_seeds():
    plan = plan_of(seeds(0, 1))
    assert len(plan.cells) == 1 + 4 * 8 * 2
    assert len({plan.paths.result(cell) for cell in plan.cells}) == len(plan.cells)
    rows = plan.spec("tables", {})["rows"]
    assert {(row["calibration"], row["seeds_of"], row["seed"]) for row in rows} == {
        ("none", "none", None),
        ("demo.seed-0", "demo", 0),
        ("demo.seed-1", "demo", 1),
    }
    more = plan_of(seeds(0, 1, 2))
    assert set(plan.cells) < set(more.cells)
    assert {plan.paths.result(cell) for cell in plan.cells} < {more.paths.result(cell) for cell in more.cells}


def test_a_preset_cannot_pass_for_a_seed():
    def change(c):
        c["calibrations"]["demo.seed-1"] = {"text": "demo_calibration"}
        seeds(0, 1)(c)

    with pytest.raises(InputError, match=r"calibrations\.demo\.seed-1: the name is taken by a seed of 'demo'"):
        plan_of(change)


def test_a_study_is_scored_on_the_tasks_of_its_kind_that_are_configured():
    assert not plan_of().studies.scores("coupling")

    def change(config):
        next(iter(config["experiments"].values()))["evaluations"] += ["tasks", "times"]

    plan = plan_of(change)
    scored = plan.studies.scores("coupling")
    assert {cell.kind for cell, _ in scored} == {"accuracy"}
    assert [own["method"] for _, own in scored] == ["dense", "coupled", "whitened", "whitened"]
    assert len({plan.paths.result(cell) for cell, _ in scored}) == 4
    assert not plan.studies.scores("ffsplit"), "no task of kind classification"


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (
            "winnow.allocation.kinds.nonexistent",
            r"src: there is no module winnow\.allocation\.kinds\.nonexistent, so its code cannot be",
        ),
        ("winnow.metrics_of_old", r"src: there is no module winnow\.metrics_of_old, so its code cannot be tracked"),
        ("nonexistent.py", r"scripts/nonexistent\.py: there is no such script, so its code cannot be tracked"),
    ],
)
def test_what_cannot_be_found_has_no_fingerprint(entry, line):
    with pytest.raises(InputError, match=line):
        CodeTracker(ROOT).fingerprint("compress.py", entry)


def test_an_import_from_a_module_that_is_gone_has_none_either(checkout):
    path = checkout / "scripts" / "compress.py"
    path.write_text(path.read_text() + "\nfrom winnow.gone import something\n")
    with pytest.raises(InputError, match=r"there is no module winnow\.gone\.something, so its code cannot be tracked"):
        CodeTracker(checkout).fingerprint("compress.py")
