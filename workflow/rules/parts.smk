# needs: a model, windows of calibration tokens      makes: statistics of every matrix's input and gradients of every output
# steps: collect_statistics_part, collect_gradients_part (sums over a part of the windows, for models with `window_shards`),
#        merge_statistics, merge_gradients (add them up, and remove them)


rule collect_statistics_part:
    """Run a part of the calibration windows; keep sums of the products of inputs."""
    input:
        model="results/{model}/model.json",
        tokens="results/{model}/tokens/{calibration}.safetensors",
    output:
        moments="results/{model}/{calibration}/statistics/parts/moments/{part}/manifest.json",
    log:
        "results/logs/collect_statistics_part/{model}/{calibration}/{part}.log",
    benchmark:
        "results/benchmarks/collect_statistics_part/{model}/{calibration}/{part}.tsv"
    threads: 1
    resources:
        gpu=1,
        batch_tokens=4096,
        stream=streamed,
        mem_mb=memory("collect_statistics_part", 16000),  # the model and all its Gram matrices
        runtime=minutes(60),
    params:
        **stage("collect_statistics"),
    script:
        "../../scripts/collect_statistics.py"


rule collect_gradients_part:
    """A forward and a backward pass over a part of the calibration windows; keeps sums of the products of gradients."""
    input:
        model="results/{model}/model.json",
        tokens="results/{model}/tokens/{calibration}.safetensors",
    output:
        "results/{model}/{calibration}/statistics/parts/gradients/{part}/manifest.json",
    log:
        "results/logs/collect_gradients_part/{model}/{calibration}/{part}.log",
    benchmark:
        "results/benchmarks/collect_gradients_part/{model}/{calibration}/{part}.tsv"
    threads: 1
    resources:
        gpu=1,
        batch_tokens=2048,
        stream=streamed,
        hidden_mb=0,  # of hidden states on disk, where `stream` is 1; 0: half of the model's bytes, at least 4 GB
        mem_mb=memory("collect_gradients_part", 16000),  # the model, its activations, and second moments of all outputs
        runtime=minutes(60),
    params:
        **stage("collect_gradients"),
    script:
        "../../scripts/collect_gradients.py"


rule merge_statistics:
    """Add up the sums of all parts of the calibration windows, and divide them by the number of tokens."""
    input:
        model="results/{model}/model.json",
        tokens="results/{model}/tokens/{calibration}.safetensors",
        parts=lambda w: PLAN.paths.parts(w.model, w.calibration, "moments"),
    output:
        moments="results/{model}/{calibration}/statistics/moments/manifest.json",
        channels="results/{model}/{calibration}/statistics/channels.parquet",
    log:
        "results/logs/merge_statistics/{model}/{calibration}.log",
    benchmark:
        "results/benchmarks/merge_statistics/{model}/{calibration}.tsv"
    wildcard_constraints:
        model=PLAN.models_of(parted=True),
    threads: 1
    resources:
        mem_mb=memory("merge_statistics", 8000),  # the moments of one layer
        runtime=minutes(60),
    params:
        **stage("merge_statistics"),
    script:
        "../../scripts/merge_statistics.py"


rule merge_gradients:
    """Add up the sums of all parts of the calibration windows, and divide them by the number of tokens."""
    input:
        model="results/{model}/model.json",
        tokens="results/{model}/tokens/{calibration}.safetensors",
        parts=lambda w: PLAN.paths.parts(w.model, w.calibration, "gradients"),
    output:
        "results/{model}/{calibration}/statistics/gradients/manifest.json",
    log:
        "results/logs/merge_gradients/{model}/{calibration}.log",
    benchmark:
        "results/benchmarks/merge_gradients/{model}/{calibration}.tsv"
    wildcard_constraints:
        model=PLAN.models_of(parted=True),
    threads: 1
    resources:
        mem_mb=memory("merge_gradients", 8000),  # the moments of one layer
        runtime=minutes(60),
    params:
        **stage("merge_gradients"),
    script:
        "../../scripts/merge_gradients.py"
