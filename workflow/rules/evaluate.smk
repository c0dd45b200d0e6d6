# needs: models or checkpoints, and what a kind of evaluation reads      makes: a JSON file per cell
# steps, of every kind of evaluation: evaluate_<kind>_dense for the dense model (evaluate_dense of perplexity), evaluate_<kind> for
#        compressed ones, evaluate_<kind>_healed for the dense one after a recovery


READ = {  # what an evaluation can read beside the model
    "tokens": "results/{model}/tokens/{evaluation}.safetensors",
    "tasks": "results/tasks/{evaluation}.json",
    "files": task_files,
    "test": rows_of_task("test.parquet"),
    "facts": rows_of_task("task.json"),
}
OVERLAP = {
    "tokens": overlap_check,
    "test": rows_check,
}  # that the calibration shares nothing with it
CELL = "{model}/{calibration}/{method}/{budget}/{recovery}"
HEALED = "{model}/{calibration}/dense/{recovery}"


def read_by_evaluation(kind, checkpoint=None):
    """The inputs of a rule that evaluates: the dense model, or a checkpoint."""
    evaluation = EVALUATIONS[kind]
    found = {name: READ[name] for name in evaluation.reads}
    if checkpoint:
        found |= {"checkpoint": checkpoint}
        found |= {
            "overlap": OVERLAP[name] for name in evaluation.reads if name in OVERLAP
        }
        if evaluation.paired:
            found |= {"dense": "results/{model}/dense/{evaluation}.json"}
    return {"model": "results/{model}/model.json", **found}


def asked_by_evaluation(kind, name, compressed):
    """The resources of a rule that evaluates. A batch changes no number beyond rounding; `stream` is 1 where the weights of one
    block are in memory at a time, as the model's `load` says."""
    evaluation = EVALUATIONS[kind]
    streams = {"stream": streamed} if evaluation.streams else {}
    return {
        **evaluation.batch,
        **streams,
        "mem_mb": memory(name, evaluation.memory_mb[compressed]),
        "runtime": minutes(evaluation.minutes),
    }


for kind, evaluation in EVALUATIONS.items():
    dense = "evaluate_dense" if kind == PLAIN else f"evaluate_{kind}_dense"

    rule:
        name:
            dense
        input:
            **read_by_evaluation(kind),
        output:
            "results/{model}/dense/{evaluation}.json",
        log:
            f"results/logs/{dense}/{{model}}/{{evaluation}}.log",
        benchmark:
            f"results/benchmarks/{dense}/{{model}}/{{evaluation}}.tsv"
        wildcard_constraints:
            evaluation=PLAN.pattern("evaluations", kind=kind),
        threads: ALL_CORES if evaluation.alone else 1
        resources:
            **asked_by_evaluation(kind, dense, 0),
            gpu=1,
        params:
            **stage(f"evaluate_{kind}"),
        script:
            "../../scripts/evaluate.py"

    rule:
        name:
            f"evaluate_{kind}"
        input:
            **read_by_evaluation(kind, evaluated_checkpoint),
        output:
            f"results/{CELL}/{{evaluation}}.json",
        log:
            f"results/logs/evaluate_{kind}/{CELL}/{{evaluation}}.log",
        benchmark:
            f"results/benchmarks/evaluate_{kind}/{CELL}/{{evaluation}}.tsv"
        wildcard_constraints:
            evaluation=PLAN.pattern("evaluations", kind=kind),
        threads: ALL_CORES if evaluation.alone else 1
        resources:
            **asked_by_evaluation(kind, f"evaluate_{kind}", 1),
            gpu=1,
        params:
            **stage(f"evaluate_{kind}"),
        script:
            "../../scripts/evaluate.py"

    if evaluation.recovered:

        rule:
            name:
                f"evaluate_{kind}_healed"
            input:
                **read_by_evaluation(kind, f"results/{HEALED}/checkpoint/manifest.json"),
            output:
                f"results/{HEALED}/{{evaluation}}.json",
            log:
                f"results/logs/evaluate_{kind}_healed/{{model}}/{{calibration}}/{{recovery}}/{{evaluation}}.log",
            benchmark:
                f"results/benchmarks/evaluate_{kind}_healed/{{model}}/{{calibration}}/{{recovery}}/{{evaluation}}.tsv"
            wildcard_constraints:
                evaluation=PLAN.pattern("evaluations", kind=kind),
            threads: 1
            resources:
                **asked_by_evaluation(kind, f"evaluate_{kind}_healed", 1),
                gpu=1,
            params:
                **stage(f"evaluate_{kind}"),
            script:
                "../../scripts/evaluate.py"
