# needs: rows of classification tasks on disk or on the hub      makes: train rows apart from test rows, windows of train rows
# steps: retrieve_examples (may need the network: `snakemake prefetch`), tokenize_rows, check_rows


rule retrieve_examples:
    """Read the rows of a task, number the classes, and keep train rows apart from test rows."""
    input:
        files=example_files,
    output:
        train="results/examples/{task}/train.parquet",
        test="results/examples/{task}/test.parquet",
        facts="results/examples/{task}/task.json",
    log:
        "results/logs/retrieve_examples/{task}.log",
    benchmark:
        "results/benchmarks/retrieve_examples/{task}.tsv"
    threads: 1
    resources:
        mem_mb=memory("retrieve_examples", 4000),
        runtime=minutes(60),
    params:
        **stage("retrieve_examples"),
    script:
        "../../scripts/retrieve_examples.py"


rule tokenize_rows:
    """Train rows of a task as windows that statistics are collected on."""
    input:
        model="results/{model}/model.json",
        rows=rows_of_task("train.parquet", task_of_calibration),
    output:
        "results/{model}/tokens/{windows}.safetensors",
    log:
        "results/logs/tokenize_rows/{model}/{windows}.log",
    benchmark:
        "results/benchmarks/tokenize_rows/{model}/{windows}.tsv"
    wildcard_constraints:
        windows=PLAN.windows_of("task"),
    threads: 1
    resources:
        mem_mb=memory("tokenize_rows", 4000),
        runtime=minutes(20),
    params:
        **stage("tokenize_rows"),
    script:
        "../../scripts/tokenize_rows.py"


rule check_rows:
    """Refuse a calibration text that holds test rows of a task."""
    input:
        calibration="results/texts/{text}.parquet",
        evaluation="results/examples/{task}/test.parquet",
    output:
        "results/texts/overlap/{text}/{task}.json",
    log:
        "results/logs/check_rows/{text}/{task}.log",
    benchmark:
        "results/benchmarks/check_rows/{text}/{task}.tsv"
    threads: 1
    resources:
        mem_mb=memory("check_rows", 8000),  # 16 bytes a word
        runtime=minutes(20),
    params:
        **stage("check_overlap"),
    script:
        "../../scripts/check_overlap.py"
