# needs: a model, windows of calibration tokens      makes: statistics of every matrix's input
# steps: collect_statistics (one forward pass for all methods, ranks and budgets), collect_gradients (one forward and one backward,
#        where a metric weighs outputs), collect_outer (the same, where a budget targets the embeddings or the head); windows over
#        jobs (`window_shards`): parts.smk


rule collect_statistics:
    """Run the calibration windows once; keep a Gram matrix and channel statistics per distinct input."""
    input:
        model="results/{model}/model.json",
        tokens="results/{model}/tokens/{calibration}.safetensors",
    output:
        moments="results/{model}/{calibration}/statistics/moments/manifest.json",
        channels="results/{model}/{calibration}/statistics/channels.parquet",
    log:
        "results/logs/collect_statistics/{model}/{calibration}.log",
    benchmark:
        "results/benchmarks/collect_statistics/{model}/{calibration}.tsv"
    wildcard_constraints:
        model=PLAN.models_of(parted=False),
    threads: 2
    resources:
        gpu=1,
        batch_tokens=4096,  # per forward pass; --set-resources changes it, and no number beyond rounding
        stream=streamed,  # 1: the weights of one block at a time, as the model's `load` says
        mem_mb=memory("collect_statistics", 16000),  # the model and all its Gram matrices
        runtime=minutes(60),
    params:
        **stage("collect_statistics"),
    script:
        "../../scripts/collect_statistics.py"


rule collect_gradients:
    """A forward and a backward pass over the calibration windows; keeps second moments of the gradients in all outputs."""
    input:
        model="results/{model}/model.json",
        tokens="results/{model}/tokens/{calibration}.safetensors",
    output:
        "results/{model}/{calibration}/statistics/gradients/manifest.json",
    log:
        "results/logs/collect_gradients/{model}/{calibration}.log",
    benchmark:
        "results/benchmarks/collect_gradients/{model}/{calibration}.tsv"
    wildcard_constraints:
        model=PLAN.models_of(parted=False),
    threads: 2
    resources:
        gpu=1,
        batch_tokens=2048,
        stream=streamed,
        hidden_mb=0,  # of hidden states on disk, where `stream` is 1; 0: half of the model's bytes, at least 4 GB
        mem_mb=memory("collect_gradients", 16000),  # the model, its activations, and second moments of all outputs
        runtime=minutes(60),
    params:
        **stage("collect_gradients"),
    script:
        "../../scripts/collect_gradients.py"


rule collect_outer:
    """A forward and a backward pass over the calibration windows; keeps what weighs errors of the embeddings and the head."""
    input:
        model="results/{model}/model.json",
        tokens="results/{model}/tokens/{calibration}.safetensors",
    output:
        "results/{model}/{calibration}/statistics/outer/manifest.json",
    log:
        "results/logs/collect_outer/{model}/{calibration}.log",
    benchmark:
        "results/benchmarks/collect_outer/{model}/{calibration}.tsv"
    threads: 2
    resources:
        gpu=1,
        batch_tokens=2048,
        mem_mb=memory("collect_outer", 16000),  # the model, its activations, and the logits of a batch
        runtime=minutes(60),
    params:
        **stage("collect_outer"),
    script:
        "../../scripts/collect_outer.py"


rule statistics:
    """Statistics of all calibrations."""
    input:
        of_cells("results/{model}/{calibration}/statistics/channels.parquet"),
