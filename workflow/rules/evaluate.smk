# needs: models or checkpoints, and what a kind of evaluation reads      makes: a JSON file per cell
# steps, of every kind of evaluation: evaluate_<kind>_dense for the dense model (evaluate_dense of perplexity), evaluate_<kind> for
#        compressed ones, evaluate_<kind>_healed for the dense one after a recovery


CELL = "{model}/{calibration}/{method}/{budget}/{recovery}"
HEALED = "{model}/{calibration}/dense/{recovery}"

for kind, evaluation in EVALUATIONS.items():
    dense = "evaluate_dense" if kind == PLAIN else f"evaluate_{kind}_dense"

    rule:
        name:
            dense
        input:
            **read_by_evaluation(kind),
        output:
            "results/{model}/dense/{evaluation}.json",
            **kept_by_evaluation(kind),
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
