"""What jobs ask of a cluster: the forecast with a margin where there is one, more at every retry, and a default else."""

from tests.unit.test_forecast import DEMO
from tests.unit.test_plan import plan_of
from winnow.models.shape import shape_of
from winnow.planning.forecast import forecast
from winnow.planning.needs import MARGIN, RUNNER, Needs


def test_memory_is_the_forecast_with_a_margin_and_doubles_at_a_retry():
    plan = plan_of()
    needs, label = Needs(plan), plan.labels["models"]["demo"]
    works = {work.stage: work for work in forecast(plan, {"demo": shape_of(DEMO)})}
    asked = needs.memory_mb("evaluate_perplexity", label, 1, 24000)
    assert 0 <= asked * 1e6 - (MARGIN * works["evaluate_perplexity"].memory + RUNNER) < 1e8
    assert [needs.memory_mb("evaluate_perplexity", label, attempt, 24000) for attempt in (2, 3)] == [2 * asked, 4 * asked]
    assert needs.memory_mb("report", label, 2, 2000) == 4000, "no forecast: the default, and more at a retry"


def test_a_model_that_is_not_here_yet_gets_the_default(tmp_path):
    hub = {"source": "someone/model", "revision": "0" * 40}
    plan = plan_of(lambda c: c["models"].update(hub=hub))
    label = plan.labels["models"]["hub"]
    assert Needs(plan, tmp_path).memory_mb("compress", label, 1, 16000) == 16000
    (tmp_path / label).mkdir()
    (tmp_path / label / "model.json").write_text("cut")
    assert Needs(plan, tmp_path).memory_mb("compress", label, 1, 16000) == 16000, "the job says that it is damaged"


def test_every_kind_of_evaluation_and_every_method_that_clusters_is_forecast():
    def change(c):
        experiment = next(iter(c["experiments"].values()))
        kinds = {**experiment, "evaluations": ["tasks", "times", "demo"], "methods": ["column_clusters"]}
        kinds |= {"export": "dense", "controls": False}
        c["experiments"] = {"only": kinds}
        c["methods"]["column_clusters"] = {"structure": {"kind": "cluster"}, "metric": {"kind": "weights"}}

    works = {work.stage: work for work in forecast(plan_of(change), {"demo": shape_of(DEMO)})}
    assert works["assign_clusters"].jobs == 1
    assert works["export_dense"].jobs == 8
    assert works["evaluate_accuracy"].jobs == works["evaluate_latency"].jobs == 8
    assert works["evaluate_accuracy_dense"].jobs == works["evaluate_latency_dense"].jobs == 1
