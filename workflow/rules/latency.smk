# needs: models and checkpoints      makes: latency JSON, results/tables/latency
# steps: evaluate_latency, for compressed models beside the dense one; evaluate_latency_dense, by the same script, for the
# dense model beside itself; tabulate_latency


rule evaluate_latency:
    """Time of a compressed model, in turns with the dense one in the same process."""
    input:
        model="results/{model}/model.json",
        checkpoint=evaluated_checkpoint,
    output:
        "results/{model}/{calibration}/{method}/{budget}/{recovery}/{evaluation}.json",
    log:
        "results/logs/evaluate_latency/{model}/{calibration}/{method}/{budget}/{recovery}/{evaluation}.log",
    benchmark:
        "results/benchmarks/evaluate_latency/{model}/{calibration}/{method}/{budget}/{recovery}/{evaluation}.tsv"
    wildcard_constraints:
        evaluation=PLAN.pattern("evaluations", kind="latency"),
    threads: ALL_CORES
    resources:
        gpu=1,
        mem_mb=memory("evaluate_latency", 24000),  # the compressed and the dense model
        runtime=minutes(60),
    params:
        **stage("evaluate_latency"),
    script:
        "../../scripts/evaluate_latency.py"


rule evaluate_latency_dense:
    """Time of the dense model, in turns with itself: what this machine cannot tell apart."""
    input:
        model="results/{model}/model.json",
    output:
        "results/{model}/dense/{evaluation}.json",
    log:
        "results/logs/evaluate_latency_dense/{model}/{evaluation}.log",
    benchmark:
        "results/benchmarks/evaluate_latency_dense/{model}/{evaluation}.tsv"
    wildcard_constraints:
        evaluation=PLAN.pattern("evaluations", kind="latency"),
    threads: ALL_CORES
    resources:
        gpu=1,
        mem_mb=memory("evaluate_latency_dense", 16000),
        runtime=minutes(60),
    params:
        **stage("evaluate_latency"),
    script:
        "../../scripts/evaluate_latency.py"


rule tabulate_latency:
    """One row per cell that measures latency, phase, batch size and prompt; times are in no other table."""
    input:
        results_of("latency"),
    output:
        csv="results/tables/latency.csv",
        parquet="results/tables/latency.parquet",
    log:
        "results/logs/tabulate_latency.log",
    benchmark:
        "results/benchmarks/tabulate_latency.tsv"
    localrule: True
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        **stage("tabulate_latency"),
    script:
        "../../scripts/tabulate_latency.py"


rule latency:
    """Latency of all cells that measure it, as a table."""
    input:
        rules.tabulate_latency.output,
