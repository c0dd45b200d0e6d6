# needs: model directories or hub ids, rows of classification tasks      makes: models tuned on a task, before anything else
# steps: retrieve_base (may need the network: `snakemake prefetch`), finetune; retrieve_model then reads what was made


rule retrieve_base:
    """Find or download the model that is tuned; record the digests of its files."""
    input:
        unpack(base_model),
    output:
        "results/{model}/base.json",
    log:
        "results/logs/retrieve_base/{model}.log",
    benchmark:
        "results/benchmarks/retrieve_base/{model}.tsv"
    threads: 1
    resources:
        mem_mb=memory("retrieve_base", 2000),
        runtime=minutes(120),  # a download
    params:
        **stage("retrieve_base"),
    script:
        "../../scripts/retrieve_base.py"


rule finetune:
    """Train a model as a classifier on the train rows of its task."""
    input:
        base="results/{model}/base.json",
        train=rows_of_task("train.parquet", task_of_model),
        facts=rows_of_task("task.json", task_of_model),
    output:
        "results/{model}/tuned/manifest.json",
    log:
        "results/logs/finetune/{model}.log",
    benchmark:
        "results/benchmarks/finetune/{model}.tsv"
    threads: 2
    resources:
        gpu=1,
        mem_mb=memory("finetune", 16000),  # weights, gradients and AdamW's two moments in float32, activations of a batch
        runtime=minutes(480),
    params:
        **stage("finetune"),
    script:
        "../../scripts/finetune.py"
