"""The forecast: the same from headers and from a manifest, the jobs that a dry run counts, and one line for what cannot fit."""

import math
from dataclasses import replace

import pytest

from tests.conftest import ROOT
from tests.unit.test_plan import plan_of
from winnow.errors import InputError
from winnow.io.artifacts import write_json
from winnow.io.tensors import read_header
from winnow.models.retrieve import describe
from winnow.models.shape import shape_of
from winnow.numerics.operations import EIGEN, Operations
from winnow.planning.config import load
from winnow.planning.config_files import default
from winnow.planning.forecast import at_peak, forecast, machine, measured_seconds, misfit, numbers_of
from winnow.planning.load import A_FILE, GB, Work
from winnow.planning.plan import Plan
from winnow.planning.preview import disk_lines, duration, jobs_of, size
from winnow.planning.rates import Rates, alike, of_this_machine, rates_of
from winnow.planning.stages.collect_statistics import ROW
from winnow.planning.stages.compress import SIZE
from winnow.structures.rounded import feeding_back

DEMO = ROOT / "resources" / "models" / "demo"
DRY_RUN = """Job stats:
job                    count
-------------------  -------
compress                  32
retrieve_model             1
total                     33

Reasons:
    (check individual jobs above for details)
"""


def test_headers_say_what_the_manifest_says(saved_model, tmp_path):
    """For every family: nothing but the config and the headers of the weight files is read."""
    found = describe(saved_model)
    write_json(tmp_path / "model.json", found)
    by_headers, by_manifest = shape_of(saved_model), shape_of(saved_model, tmp_path / "model.json")
    assert by_headers.sites() == by_manifest.sites()
    assert [m.shape for m in by_headers.matrices] == [m.shape for m in by_manifest.matrices]
    assert by_manifest.bytes == found["bytes"]


def test_jobs_bytes_and_memory_of_the_demo():
    plan, shape = plan_of(), shape_of(DEMO)
    works = {work.stage: work for work in forecast(plan, {"demo": shape})}
    jobs = {"collect_statistics": 1, "factorize": 4, "measure_spectra": 4, "compress": 32, "tokenize": 2}
    assert {stage: works[stage].jobs for stage in jobs} == jobs
    assert works["evaluate_perplexity"].jobs == 32
    assert "collect_gradients" not in works, "no metric of the default asks for gradients"
    square, cross = 6 * (128**2 * 3 + 352**2), 6 * 352 * 128  # four inputs a layer, and the FFN's cross moment; float64
    gram = square + cross
    assert works["collect_statistics"].disk == pytest.approx(8 * (square / 2 + cross), rel=0.1), "symmetric ones by half"
    assert works["collect_statistics"].disk > 8 * (square / 2 + cross)
    assert works["collect_statistics"].temporary == 2 * 8 * gram, "sums that are saved, the last and the next"
    assert works["collect_statistics"].memory > 8 * gram + 4 * shape.numbers
    doubled = plan_of(lambda c: c["calibrations"]["demo"].update(windows=256))
    more = {work.stage: work for work in forecast(doubled, {"demo": shape})}
    assert more["collect_statistics"].operations == 2 * works["collect_statistics"].operations
    assert more["factorize"] == works["factorize"]


def test_factors_without_tensors_are_small_and_fitted_again_for_every_checkpoint():
    def works(factors, method="winnow", budgets=("ffn-0.8", "ffn-0.4")) -> dict[str, Work]:
        def change(c):
            c["models"]["demo"]["factors"] = factors
            c["budgets"] |= {name: c["budgets"][name] | {"allocation": {"kind": "ilp"}} for name in budgets}
            c["experiments"]["demo"] |= {"methods": [method], "budgets": list(budgets)}

        return {work.stage: work for work in forecast(plan_of(change), {"demo": shape_of(DEMO)})}

    stored, refitted = works("stored"), works("refitted")
    assert "compress_refitted" not in stored
    assert "compress" not in refitted
    assert refitted["factorize"].disk < 0.15 * stored["factorize"].disk
    assert refitted["factorize"].operations > stored["factorize"].operations, "losses are predicted in the same job"
    assert refitted["predict_losses"].operations < stored["predict_losses"].operations
    again, plain = refitted["compress_refitted"], stored["compress"]
    assert (again.jobs, again.disk) == (plain.jobs, plain.disk)
    assert 0 == plain.operations < again.operations < 2 * stored["factorize"].operations
    assert works("refitted", budgets=("ffn-0.8",))["compress_refitted"].operations == again.operations / 2
    inputs, kept = works("refitted", "whitened"), works("stored", "whitened")
    assert inputs["factorize"].operations == kept["factorize"].operations, "a metric without gradients"
    assert inputs["factorize"].disk < 0.15 * kept["factorize"].disk
    assert inputs["predict_losses"].operations == kept["predict_losses"].operations + inputs["factorize"].operations
    assert inputs["compress_refitted"].operations == 2 * inputs["factorize"].operations
    plan = plan_of(lambda c: c["models"]["demo"].update(factors="refitted"))
    kinds = {name: plan.config.methods[name].structure.kind for name in plan.members["winnow"]}
    model, methods = plan.labels["models"]["demo"], plan.labels["methods"]
    assert all(plan.refits(model, methods[name]) for name in kinds)
    later = [kind for name, kind in kinds.items() if not plan.predicts_at_once(methods[name])]
    assert later == ["affine_block"], "which reads no gradients"
    labels = plan.labels["methods"]
    assert [plan.refits(model, labels[name]) for name in ("svd", "clusters_norm")] == [False, False]
    assert plan.refits_with(labels["whitened"]) == {"moments"}


def test_an_export_is_forecast_in_its_dtype():
    shape = shape_of(DEMO)

    def work(**options) -> Work:
        def change(c):
            c["experiments"]["demo"] |= {"export": "dense", "methods": ["svd"], "budgets": ["ffn-0.8", "ffn-0.4"], **options}

        return next(work for work in forecast(plan_of(change), {"demo": shape}) if work.stage == "export_dense")

    original, wide = work(), work(export_dtype="float32")
    assert (original.jobs, wide.jobs) == (2, 2)
    assert original.disk == 2 * shape.bytes
    assert wide.disk == 2 * 4 * shape.numbers > original.disk
    assert wide.memory - original.memory == 4 * shape.numbers - shape.bytes


def test_streaming_asks_for_a_block_and_not_for_the_model():
    shape = shape_of(DEMO)

    def works(load: str, layers: int = 6) -> dict:
        """As if the model had more layers of the same shape."""
        more = [replace(m, layer=m.layer + 6 * copy) for m in shape.matrices for copy in range(layers // 6)]
        numbers = shape.numbers + sum(math.prod(m.shape) for m in more[len(shape.matrices) :])
        large = replace(shape, matrices=more, numbers=numbers, bytes=4 * numbers, layers=layers)
        return {w.stage: w for w in forecast(plan_of(lambda c: c["models"]["demo"].update(load=load)), {"demo": large})}

    for stage in ("collect_statistics", "evaluate_dense", "evaluate_perplexity"):
        small, deep = (works("stream", layers)[stage].memory for layers in (6, 600))
        rows = 594 * sum(shape.sites().values()) // 6 if stage == "collect_statistics" else 0  # of the table of channels
        assert deep - small <= ROW * rows + 1e8, stage
        assert works("whole", 600)[stage].memory > deep + 100e6, stage
    sizes = 594 // 6 * sum(math.prod(m.shape) // sum(m.shape) for m in shape.matrices)  # more of them, in the table of sizes
    assert works("stream", 600)["compress"].memory - works("stream")["compress"].memory == SIZE * sizes
    written = 2 * 128 * 256 * shape.width * 4  # hidden states before and behind a block
    streamed, whole = works("stream"), works("whole")
    assert streamed["collect_statistics"].temporary == written
    assert streamed["collect_statistics"].disk == whole["collect_statistics"].disk
    assert streamed["collect_statistics"].written == 3 * written, "the output of every one of 6 blocks"
    assert streamed["evaluate_perplexity"].temporary > whole["evaluate_perplexity"].temporary == 0


def test_learning_holds_the_factors_and_takes_its_steps():
    def works(**options):
        def change(c):
            c["budgets"]["x"] = {"targets": ["ffn"], "keep_bytes": 0.8, "allocation": {"kind": "learned", **options}}
            c["experiments"] = {"only": {**next(iter(c["experiments"].values())), "methods": ["whitened"], "budgets": ["x"]}}

        return {w.stage: w for w in forecast(plan_of(change), {"demo": shape_of(DEMO)})}

    one = works(steps=100, every=100)
    assert one["learn_sizes"].jobs == 1
    factors, shape = 6 * 3 * 128 * 352, shape_of(DEMO)
    assert one["learn_sizes"].memory > 4 * (shape.numbers + factors)
    passes = (4 * 256 * 100 * (6 * shape.numbers + 4 * factors), 2 * 16 * 256 * 4 * shape.numbers)  # steps, and two looks
    assert one["learn_sizes"].operations == sum(passes)
    assert works(batch=8)["learn_sizes"].memory > one["learn_sizes"].memory
    assert "collect_gradients" not in one
    assert "collect_gradients" in works(start="ilp")


def test_few_tokens_take_eigenproblems_to_predict():
    def works(windows):
        def change(c):
            c["calibrations"]["demo"]["windows"] = windows
            c["experiments"]["demo"].update(methods=["whitened_ilp"])

        return {w.stage: w for w in forecast(plan_of(change), {"demo": shape_of(DEMO)})}

    enough, few = works(22)["predict_losses"], works(21)["predict_losses"]  # of 256 tokens, for 352 hidden units
    assert few.memory - enough.memory == 8 * 5 * (352 + 128) ** 2
    assert few.operations - enough.operations == 6 * 25 * (352 + 128) ** 3
    assert works(128)["predict_losses"] == enough


def test_numbers_at_a_time_are_those_of_the_stages():
    from winnow.calibration import gradients_by_block
    from winnow.evaluation import perplexity
    from winnow.evaluation.kinds.perplexity import STREAMED
    from winnow.models import retrieve
    from winnow.models.shape import PRODUCT
    from winnow.numerics import products
    from winnow.planning.stages import collect_gradients
    from winnow.planning.stages.retrieve_model import CHECKED

    assert (CHECKED, PRODUCT, STREAMED) == (retrieve.CHUNK, products.PRODUCT, perplexity.STREAMED)
    assert collect_gradients.LOGITS == gradients_by_block.LOGITS
    rule = (ROOT / "workflow" / "rules" / "statistics.smk").read_text().partition("rule collect_gradients:")[2]
    assert f"batch_tokens={collect_gradients.TOKENS}," in rule


def test_resources_that_a_run_sets_are_forecast():
    """`--set-resources collect_gradients:batch_tokens=...`, and `stream` of one rule."""
    config = default()

    def memory(**resources) -> dict[str, float]:
        plan = Plan(load(config), ROOT, resources=resources)
        return {work.stage: work.memory for work in forecast(plan, {"demo": shape_of(ROOT / config["models"]["demo"]["source"])})}

    usual, few = memory(), memory(collect_gradients={"batch_tokens": 512})
    assert few.pop("collect_gradients") < usual["collect_gradients"]
    assert few == {stage: value for stage, value in usual.items() if stage != "collect_gradients"}
    streamed = memory(collect_statistics={"stream": 1})
    assert streamed["collect_statistics"] != usual["collect_statistics"]
    assert streamed["collect_gradients"] == usual["collect_gradients"]


def test_hidden_states_of_gradients_are_forecast_as_bounded():
    """By `hidden_mb` of the rule whose jobs run: of all windows in one job, or of each of several."""
    config, shape = default(), shape_of(DEMO)
    config["models"]["demo"] |= {"load": "stream"}
    window = 5 * 256 * 128 * 4  # of six blocks, five are stored at once
    layer = 8 * sum(m.shape[0] ** 2 for m in shape.matrices) / 6 / 2  # of sums, in float64
    kept = 6 * (layer + A_FILE) + 8 * sum(m.shape[0] for m in shape.matrices)

    def disk(rule: str = "collect_gradients", **resources) -> tuple[float, float]:
        """(bytes that stay, bytes of temporary files)"""
        plan = Plan(load(config), ROOT, resources={"collect_gradients": resources} if resources else {})
        return next((work.disk, work.temporary) for work in forecast(plan, {"demo": shape}) if work.stage == rule)

    usual = disk()
    assert usual == (kept, 128 * window)
    assert disk(hidden_mb=100) == usual, "one portion"
    assert disk(hidden_mb=20) == (kept, layer + 24 * window), "30 windows fit: three batches"
    assert numbers_of({"collect_gradients": {"hidden_mb": 20, "gpu": 1}}) == {"collect_gradients": {"hidden_mb": 20}}
    config["models"]["demo"]["window_shards"] = 4
    sharded = disk("collect_gradients_part")
    assert sharded == (0, 4 * kept + 128 * window)
    assert disk("collect_gradients_part", hidden_mb=1) == sharded, "a resource of another rule"


def test_windows_over_jobs_are_forecast():
    config = default()

    def works(jobs: int) -> dict[str, Work]:
        config["models"]["demo"]["window_shards"] = jobs
        shapes = {"demo": shape_of(ROOT / config["models"]["demo"]["source"])}
        return {work.stage: work for work in forecast(Plan(load(config), ROOT), shapes)}

    one, four = works(1), works(4)
    for rule, merge in (("collect_statistics", "merge_statistics"), ("collect_gradients", "merge_gradients")):
        assert rule not in four
        assert merge not in one
        assert four[f"{rule}_part"].jobs == 4
        assert four[f"{rule}_part"].operations == one[rule].operations
        assert four[f"{rule}_part"].disk == 0, "sums are removed when they are added up"
        assert four[f"{rule}_part"].temporary >= four[merge].temporary == 4 * one[rule].disk
        assert four[merge].disk == one[rule].disk


def test_time_is_of_starts_arithmetic_and_bytes():
    work = Work("compress", "large", 2, 1 * GB, 30 * GB, Operations(1e12, 1e12, 1e12, 1e12))
    assert work.seconds(alike(1e12)) == pytest.approx(2 * 5 + 4 + 200)
    assert work.seconds(Rates(1e13, 1e12, 2e11, 1e11, 3e9)) == pytest.approx(2 * 5 + 0.1 + 1 + 5 + 10 + 10)
    assert replace(work, written=15 * GB).seconds(alike(1e12)) == pytest.approx(2 * 5 + 4 + 300)


def test_operations_are_counted_by_kind():
    """Passes of 16 bits, eigenproblems of factors, and the short calls of feedback."""

    def amounts(dtype: str, method: str) -> dict[str, Operations]:
        def change(c):
            c["models"]["demo"]["dtype"] = dtype
            c["experiments"]["demo"].update(methods=[method])

        return {work.stage: work.amounts for work in forecast(plan_of(change), {"demo": shape_of(DEMO)})}

    single, half = amounts("float32", "whitened"), amounts("bfloat16", "whitened")
    assert half["evaluate_perplexity"] == Operations(half=single["evaluate_perplexity"].products)
    shape = shape_of(DEMO)
    eigen = EIGEN * sum(min(m.shape) ** 3 for m in shape.matrices)
    products = sum(2 * m.shape[0] * m.shape[1] ** 2 for m in shape.matrices)
    assert single["factorize"] == half["factorize"] == Operations(products=products, decompositions=eigen)
    rounded = amounts("float32", "rounded_gram")["factorize"]
    assert rounded.decompositions == 0 < rounded.calls
    assert rounded * 2 + Operations(1, 2, 3, 4) == Operations(1, 2 * rounded.products + 2, 3, 2 * rounded.calls + 4)


def test_jobs_and_work_of_a_task(tmp_path):
    rows = {part: str(tmp_path / f"{part}.jsonl") for part in ("train", "test")}
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "x"}\n' * 100)
    (tmp_path / "test.jsonl").write_text('{"text": "b", "label": "x"}\n' * 40)

    def change(c, batch=10):
        task = {"kind": "classification", "train": [rows["train"]], "test": [rows["test"]], "columns": ["text"], "length": 32}
        c["evaluations"]["task"] = task
        c["models"]["demo"]["finetune"] = {"task": "task", "epochs": 2, "batch": batch}
        c["recoveries"]["again"] = {"kind": "finetune", "task": "task", "epochs": 1, "batch": batch}
        experiment = next(iter(c["experiments"].values()))
        c["experiments"] = {"only": {**experiment, "evaluations": ["task"], "recoveries": ["again"]}}

    shape = shape_of(DEMO)
    works = {work.stage: work for work in forecast(plan_of(change), {"demo": shape})}
    assert works["finetune"].operations == 6 * 2 * 100 * 32 * shape.numbers
    assert works["finetune"].disk == 4 * shape.numbers
    assert works["recover"].jobs == 32
    assert works["recover"].operations == 32 * works["finetune"].operations / 2
    assert works["evaluate_classification"].operations == 32 * 2 * 40 * 32 * shape.numbers
    assert {"evaluate_classification_dense", "evaluate_classification_healed", "recover_dense"} <= set(works)
    smaller = {work.stage: work for work in forecast(plan_of(lambda c: change(c, 5)), {"demo": shape})}
    assert smaller["finetune"].memory < works["finetune"].memory


def test_what_cannot_fit_is_refused_with_the_number():
    some = Operations(1.0)
    works = [
        Work("factorize", "large", 2, 60 * GB, 10 * GB, some, host=5 * GB),
        Work("compress", "large", 4, 1 * GB, 400 * GB, some),
    ]
    everything = {"factorize": 2, "compress": 4}
    assert misfit(works, everything, 64 * GB, 500 * GB) is None
    line = misfit(works, everything, 32 * GB, 500 * GB)
    assert line.startswith("factorize of large needs about 60.0 GB of memory, there are 32.0 GB")
    assert "need about 410.0 GB of disk, 100.0 GB are free" in misfit(works, everything, 64 * GB, 100 * GB)
    assert misfit(works, {"compress": 1}, 32 * GB, 120 * GB) is None, "a quarter of the checkpoints is left to make"
    assert misfit(works, {}, 0, 0) is None, "all is there"
    assert min(machine().values()) > 0
    assert misfit(works, everything, 8 * GB, 500 * GB, 80 * GB) is None, "on a device, the host holds less"
    assert "needs about 60.0 GB of memory on the device, there are 40.0 GB" in misfit(
        works, everything, 8 * GB, 500 * GB, 40 * GB
    )
    assert "factorize of large needs about 5.0 GB of memory, there are 3.0" in misfit(
        works, everything, 3 * GB, 500 * GB, 80 * GB
    )


def test_disk_at_peak_is_what_stays_and_the_largest_temporary_files():
    some = Operations(1.0)
    works = [
        Work("collect_statistics", "large", 1, GB, 10 * GB, some, 30 * GB, intermediate=True),
        Work("evaluate_perplexity", "large", 5, GB, 1 * GB, some, 40 * GB),
        Work("factorize", "large", 5, GB, 4 * GB, some, intermediate=True),
    ]
    assert at_peak(works) == 55 * GB
    everything = {work.stage: work.jobs for work in works}
    assert misfit(works, everything, 64 * GB, 56 * GB) is None
    assert "need about 55.0 GB of disk" in misfit(works, everything, 64 * GB, 54 * GB)
    assert misfit(works, {"factorize": 5}, 64 * GB, 5 * GB) is None
    shape = replace(shape_of(DEMO), bytes=7 * GB)
    assert disk_lines(works, {"large": shape})[0].startswith(
        "large: intermediates (statistics, gradients, factors, predictions) 14.0 GB of disk, 2.0 times the model's bytes; "
        "with all results 55.0 GB at peak, 7.9 times"
    )


def test_rates_of_a_device_are_named_or_given():
    assert rates_of("h200").half > rates_of("h200").products > rates_of("h200").decompositions
    given = {"half": "3e14", "products": 1e13, "decompositions": 1e12, "calls": 1e10, "written": 1e9}
    assert rates_of(given) == Rates(3e14, 1e13, 1e12, 1e10, 1e9)
    assert rates_of({**given, "memory": 8e10}).memory == 8e10
    for wrong in ("h20", {"half": 1e14}, {**given, "half": "fast"}, {**given, "half": -1}, {**given, "tensor": 1}, 3, []):
        with pytest.raises(InputError, match="--config device: "):
            rates_of(wrong)
    here = of_this_machine()
    assert here.half == here.calls > 1e8


def test_a_damaged_header_is_refused_by_name(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(InputError, match=r"model\.safetensors: incomplete or not a safetensors file"):
        read_header(path)


def test_times_of_earlier_jobs_are_preferred(tmp_path):
    folder = tmp_path / "benchmarks" / "compress" / "demo-1" / "few"
    folder.mkdir(parents=True)
    for name, seconds in (("a", 2.0), ("b", 5.0), ("c", 3.0)):
        (folder / f"{name}.tsv").write_text(f"s\tmax_rss\n{seconds}\t100\n")
    assert measured_seconds(tmp_path, "compress", "demo-1") == 3.0
    assert measured_seconds(tmp_path, "compress", "demo-2") is None
    assert measured_seconds(tmp_path, "factorize", "demo-1") is None


def test_words():
    assert jobs_of(DRY_RUN) == {"compress": 32, "retrieve_model": 1}
    assert jobs_of("Nothing to be done") == {}
    assert (size(1.5e9), size(2e6)) == ("1.5 GB", "2.0 MB")
    assert (duration(12), duration(600), duration(7200)) == ("12 s", "10 min", "2.0 h")


def test_rounding_costs_what_its_metric_and_its_forms_do():
    """Codes are stored in the bytes of their forms; feedback takes more than rounding to nearest, and on both sides the most."""
    found = {}
    for method in ("rounded_nearest", "rounded_gram", "rounded_two_sided"):
        plan, shape = plan_of(lambda c, only=method: c["experiments"]["demo"].update(methods=[only])), shape_of(DEMO)
        found[method] = {work.stage: work for work in forecast(plan, {"demo": shape})}["factorize"]
    codes = sum(m.shape[0] * (m.shape[1] * 28 // 8 + 6 * 2 * -(-m.shape[1] // 128)) for m in shape.matrices)
    assert all(codes < work.disk < 1.2 * codes for work in found.values())
    operations = [work.operations for work in found.values()]
    assert operations == sorted(operations)
    assert len(set(operations)) == 3
    memory = [work.memory for work in found.values()]
    assert max(memory) < 2e9


def test_a_recovery_holds_what_it_trains():
    """Codes of all matrices at once in a distillation, those of a block in a refinement, none where integers stay fixed."""

    def memory(kind: str, rounded: str) -> float:
        def change(c):
            c["recoveries"]["mine"] = {"kind": kind, "rounded": rounded}
            c["experiments"]["demo"].update(methods=["winnow"], budgets=["all-0.4"], recoveries=["mine"])

        return {work.stage: work for work in forecast(plan_of(change), {"demo": shape_of(DEMO)})}["recover"].memory

    numbers = sum(m.shape[0] * m.shape[1] for m in shape_of(DEMO).matrices)
    assert memory("distill", "codes") - memory("distill", "fixed") == pytest.approx(4 * (7 - 6 * 0.4) * numbers)
    assert memory("refine", "codes") - memory("refine", "fixed") == pytest.approx(4 * (7 - 6 * 0.4) * numbers / 6)


def test_a_refinement_of_blocks_that_are_read_holds_one_of_each_model():
    def work_of(load: str, count: int, **options) -> Work:
        def change(c):
            c["models"]["demo"]["load"] = load
            c["recoveries"]["mine"] = {"kind": "refine", **options}
            c["experiments"]["demo"].update(methods=["winnow"], budgets=["all-0.4"], recoveries=["mine"])

        shape = shape_of(DEMO)
        more = [replace(m, layer=m.layer + 6 * copy) for m in shape.matrices for copy in range(count // 6)]
        numbers = shape.numbers + sum(math.prod(m.shape) for m in more[len(shape.matrices) :])
        large = replace(shape, matrices=more, numbers=numbers, bytes=4 * numbers, layers=count)
        return {work.stage: work for work in forecast(plan_of(change), {"demo": large})}["recover"]

    assert work_of("stream", 600).memory == pytest.approx(work_of("stream", 6).memory)
    assert work_of("whole", 600).memory > work_of("stream", 600).memory + 8 * 594 / 6 * 1e6
    assert work_of("whole", 6).streams, "what `plan` advises if there is not enough memory"
    two, all_of_them = (work_of("stream", 6, **options).operations for options in ({"layers": [0, 1]}, {}))
    assert two == pytest.approx(all_of_them / 3)


def test_sequential_takes_longer_with_more_moments_and_rounding():
    def work_of(method: str, **options) -> Work:
        def change(c):
            c["recoveries"]["mine"] = {"kind": "sequential", **options}
            c["experiments"]["demo"].update(methods=[method], budgets=["all-0.4"], recoveries=["mine"])

        return {work.stage: work for work in forecast(plan_of(change), {"demo": shape_of(DEMO)})}["recover"]

    shifted, anchored, both = (
        work_of("winnow", **options) for options in ({"objective": "shifted"}, {}, {"outputs": "gradient"})
    )
    assert shifted.operations < anchored.operations < both.operations
    assert anchored.memory < both.memory, "second moments of gradients"
    fixed = work_of("winnow", outputs="gradient", rounded="fixed")
    matrices = [matrix.shape for matrix in shape_of(DEMO).matrices]
    more = sum(max(0, sum(feeding_back(m, n, True)) - 2 * m * n * n - EIGEN * min(m, n) ** 3) for m, n in matrices)
    assert both.operations - fixed.operations == pytest.approx(more, rel=1e-6)
    assert work_of("whitened", outputs="gradient").operations == pytest.approx(fixed.operations)
