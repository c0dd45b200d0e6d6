# needs: models or checkpoints, lm-eval's tasks or the user's      makes: accuracy JSON, a table
# steps: retrieve_tasks (may need the network: `snakemake prefetch`), evaluate_accuracy for compressed models,
#        by the same script evaluate_accuracy_dense, for the dense one, and evaluate_accuracy_healed, for the dense one after a
#        recovery; tabulate_accuracy


rule retrieve_tasks:
    """Load the tasks of a preset once, with their documents; whatever is wrong with them stops here."""
    input:
        files=task_files,
    output:
        "results/tasks/{evaluation}.json",
    log:
        "results/logs/retrieve_tasks/{evaluation}.log",
    benchmark:
        "results/benchmarks/retrieve_tasks/{evaluation}.tsv"
    wildcard_constraints:
        evaluation=PLAN.pattern("evaluations", kind="accuracy"),
    threads: 1
    resources:
        mem_mb=memory("retrieve_tasks", 4000),
        runtime=minutes(60),
    params:
        **stage("retrieve_tasks"),
    script:
        "../../scripts/retrieve_tasks.py"


rule evaluate_accuracy_dense:
    """Scores of the dense model: the row that every other is compared with."""
    input:
        model="results/{model}/model.json",
        tasks="results/tasks/{evaluation}.json",
        files=task_files,
    output:
        "results/{model}/dense/{evaluation}.json",
    log:
        "results/logs/evaluate_accuracy_dense/{model}/{evaluation}.log",
    benchmark:
        "results/benchmarks/evaluate_accuracy_dense/{model}/{evaluation}.tsv"
    wildcard_constraints:
        evaluation=PLAN.pattern("evaluations", kind="accuracy"),
    threads: 1
    resources:
        gpu=1,
        batch_requests=8,  # per forward pass; --set-resources changes it, and no number beyond rounding
        mem_mb=memory("evaluate_accuracy_dense", 16000),
        runtime=minutes(240),
    params:
        **stage("evaluate_accuracy"),
    script:
        "../../scripts/evaluate_accuracy.py"


rule evaluate_accuracy:
    """Scores of a compressed model, paired by document with the dense model's."""
    input:
        model="results/{model}/model.json",
        tasks="results/tasks/{evaluation}.json",
        files=task_files,
        dense="results/{model}/dense/{evaluation}.json",
        checkpoint=evaluated_checkpoint,
    output:
        "results/{model}/{calibration}/{method}/{budget}/{recovery}/{evaluation}.json",
    log:
        "results/logs/evaluate_accuracy/{model}/{calibration}/{method}/{budget}/{recovery}/{evaluation}.log",
    benchmark:
        "results/benchmarks/evaluate_accuracy/{model}/{calibration}/{method}/{budget}/{recovery}/{evaluation}.tsv"
    wildcard_constraints:
        evaluation=PLAN.pattern("evaluations", kind="accuracy"),
    threads: 1
    resources:
        gpu=1,
        batch_requests=8,  # per forward pass; --set-resources changes it, and no number beyond rounding
        mem_mb=memory("evaluate_accuracy", 16000),
        runtime=minutes(240),
    params:
        **stage("evaluate_accuracy"),
    script:
        "../../scripts/evaluate_accuracy.py"


use rule evaluate_accuracy as evaluate_accuracy_healed with:
    input:
        model="results/{model}/model.json",
        tasks="results/tasks/{evaluation}.json",
        files=task_files,
        dense="results/{model}/dense/{evaluation}.json",
        checkpoint="results/{model}/{calibration}/dense/{recovery}/checkpoint/manifest.json",
    output:
        "results/{model}/{calibration}/dense/{recovery}/{evaluation}.json",
    log:
        "results/logs/evaluate_accuracy_healed/{model}/{calibration}/{recovery}/{evaluation}.log",
    benchmark:
        "results/benchmarks/evaluate_accuracy_healed/{model}/{calibration}/{recovery}/{evaluation}.tsv"


rule tabulate_accuracy:
    """One row per evaluated cell, task and measure."""
    input:
        results_of("accuracy"),
    output:
        csv="results/tables/accuracy.csv",
        parquet="results/tables/accuracy.parquet",
    log:
        "results/logs/tabulate_accuracy.log",
    benchmark:
        "results/benchmarks/tabulate_accuracy.tsv"
    localrule: True
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        **stage("tabulate_accuracy"),
    script:
        "../../scripts/tabulate_accuracy.py"


rule accuracy:
    """Accuracy of all cells that measure it, dense ones included, and their table."""
    input:
        results_of("accuracy"),
        table_of("accuracy"),
