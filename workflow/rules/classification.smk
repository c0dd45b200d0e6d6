# needs: models or checkpoints, rows of classification tasks      makes: classification JSON, a table
# steps: evaluate_classification for compressed models; by the same script evaluate_classification_dense, for the dense one, and
#        evaluate_classification_healed, for the dense one tuned again; tabulate_classification


rule evaluate_classification_dense:
    """Scores of the dense model: the row that every other is compared with."""
    input:
        model="results/{model}/model.json",
        test=rows_of_task("test.parquet"),
        facts=rows_of_task("task.json"),
    output:
        "results/{model}/dense/{evaluation}.json",
    log:
        "results/logs/evaluate_classification_dense/{model}/{evaluation}.log",
    benchmark:
        "results/benchmarks/evaluate_classification_dense/{model}/{evaluation}.tsv"
    wildcard_constraints:
        evaluation=PLAN.pattern("evaluations", kind="classification"),
    threads: 1
    resources:
        gpu=1,
        batch_rows=32,  # per forward pass; --set-resources changes it, and no number beyond rounding
        mem_mb=memory("evaluate_classification_dense", 16000),
        runtime=minutes(120),
    params:
        **stage("evaluate_classification"),
    script:
        "../../scripts/evaluate_classification.py"


rule evaluate_classification:
    """Scores of a compressed model, paired by row with the dense model's."""
    input:
        model="results/{model}/model.json",
        test=rows_of_task("test.parquet"),
        facts=rows_of_task("task.json"),
        dense="results/{model}/dense/{evaluation}.json",
        checkpoint=evaluated_checkpoint,
        overlap=rows_check,
    output:
        "results/{model}/{calibration}/{method}/{budget}/{recovery}/{evaluation}.json",
    log:
        "results/logs/evaluate_classification/{model}/{calibration}/{method}/{budget}/{recovery}/{evaluation}.log",
    benchmark:
        "results/benchmarks/evaluate_classification/{model}/{calibration}/{method}/{budget}/{recovery}/{evaluation}.tsv"
    wildcard_constraints:
        evaluation=PLAN.pattern("evaluations", kind="classification"),
    threads: 1
    resources:
        gpu=1,
        batch_rows=32,  # per forward pass; --set-resources changes it, and no number beyond rounding
        mem_mb=memory("evaluate_classification", 16000),
        runtime=minutes(120),
    params:
        **stage("evaluate_classification"),
    script:
        "../../scripts/evaluate_classification.py"


use rule evaluate_classification as evaluate_classification_healed with:
    input:
        model="results/{model}/model.json",
        test=rows_of_task("test.parquet"),
        facts=rows_of_task("task.json"),
        dense="results/{model}/dense/{evaluation}.json",
        checkpoint="results/{model}/{calibration}/dense/{recovery}/checkpoint/manifest.json",
        overlap=rows_check,
    output:
        "results/{model}/{calibration}/dense/{recovery}/{evaluation}.json",
    log:
        "results/logs/evaluate_classification_healed/{model}/{calibration}/{recovery}/{evaluation}.log",
    benchmark:
        "results/benchmarks/evaluate_classification_healed/{model}/{calibration}/{recovery}/{evaluation}.tsv"


rule tabulate_classification:
    """One row per evaluated cell and measure."""
    input:
        results_of("classification"),
    output:
        csv="results/tables/classification.csv",
        parquet="results/tables/classification.parquet",
    log:
        "results/logs/tabulate_classification.log",
    benchmark:
        "results/benchmarks/tabulate_classification.tsv"
    localrule: True
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        **stage("tabulate_classification"),
    script:
        "../../scripts/tabulate_classification.py"


rule classification:
    """Classification scores of all cells that measure them, dense ones included, and their table."""
    input:
        results_of("classification"),
        table_of("classification"),
