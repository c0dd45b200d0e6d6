# needs: factors, spectra, predicted losses where the allocation asks for them, a budget      makes: sizes of every group, compressed checkpoints, dense models of them
# steps: time_forms, predict_in_rounds and learn_sizes (where the allocation asks for them), compress, export_dense (where an experiment says `export: dense`)


rule time_forms:
    """Measure how long products with the forms of the matrices take, where a budget's allocation bounds the time."""
    input:
        model="results/{model}/model.json",
    output:
        "results/{model}/times/{timing}.json",
    log:
        "results/logs/time_forms/{model}/{timing}.log",
    benchmark:
        "results/benchmarks/time_forms/{model}/{timing}.tsv"
    threads: ALL_CORES
    resources:
        gpu=lambda w: int(PLAN.timings()[w.timing][1].device == "cuda"),
        mem_mb=memory("time_forms", 8000),  # copies of a dense matrix and of one form of it
        runtime=minutes(120),
    params:
        **stage("time_forms"),
    script:
        "../../scripts/time_forms.py"


rule predict_in_rounds:
    """Predict the losses anew around the model as the budget compresses it, where its allocation has `rounds`."""
    input:
        **REFITTED_WITH,
        model="results/{model}/model.json",
        tokens="results/{model}/tokens/{calibration}.safetensors",
        factors=factors_of_method,
        spectra=of_members("spectra.parquet"),
        predicted=of_members("predicted.parquet"),
        times=times_for_budget,
    output:
        predicted="results/{model}/{calibration}/{method}/{budget}/predicted.parquet",
        rounds="results/{model}/{calibration}/{method}/{budget}/rounds.json",
    log:
        "results/logs/predict_in_rounds/{model}/{calibration}/{method}/{budget}.log",
    benchmark:
        "results/benchmarks/predict_in_rounds/{model}/{calibration}/{method}/{budget}.tsv"
    threads: 2
    resources:
        gpu=1,
        batch_tokens=2048,
        mem_mb=memory("predict_in_rounds", 24000),  # the compressed model, its activations, and second moments of all inputs and outputs
        runtime=minutes(240),
    params:
        **stage("predict_in_rounds"),
    script:
        "../../scripts/predict_in_rounds.py"


rule learn_sizes:
    """Learn a size for every group of matrices on what the model loses, where the budget's allocation is `learned`."""
    input:
        **REFITTED_WITH,
        model="results/{model}/model.json",
        tokens="results/{model}/tokens/{calibration}.safetensors",
        factors=factors_of_method,
        spectra=of_members("spectra.parquet"),
        predicted=predicted_for_budget,
    output:
        "results/{model}/{calibration}/{method}/{budget}/learned.json",
    log:
        "results/logs/learn_sizes/{model}/{calibration}/{method}/{budget}.log",
    benchmark:
        "results/benchmarks/learn_sizes/{model}/{calibration}/{method}/{budget}.tsv"
    threads: 2
    resources:
        gpu=1,
        mem_mb=memory("learn_sizes", 32000),  # the dense model, all factors beside it, and the activations of both
        runtime=minutes(480),
    params:
        **stage("learn_sizes"),
    script:
        "../../scripts/learn_sizes.py"


rule compress:
    """Turn the budget into one size per group, cut the factors to it and write a checkpoint that `from_pretrained` loads."""
    input:
        **REFITTED_WITH,
        model="results/{model}/model.json",
        factors=factors_of_method,
        spectra=of_members("spectra.parquet"),
        predicted=predicted_for_budget,
        times=times_for_budget,
        learned=learned_for_budget,
    output:
        allocation="results/{model}/{calibration}/{method}/{budget}/allocation.json",
        checkpoint="results/{model}/{calibration}/{method}/{budget}/checkpoint/manifest.json",
    log:
        "results/logs/compress/{model}/{calibration}/{method}/{budget}.log",
    benchmark:
        "results/benchmarks/compress/{model}/{calibration}/{method}/{budget}.tsv"
    wildcard_constraints:
        model=PLAN.models_of_factors("stored"),
    threads: 1
    resources:
        mem_mb=memory("compress", 16000),  # the weights in their stored dtype
        runtime=minutes(60),
    params:
        **stage("compress"),
    script:
        "../../scripts/compress.py"


rule checkpoints:
    """Compressed checkpoints of all cells, after their recovery if they have one."""
    input:
        made_of_cells("checkpoint"),


rule export_dense:
    """Multiply a checkpoint out to a dense model, for programs that know nothing of winnow."""
    input:
        "results/{model}/{calibration}/{method}/{budget}/checkpoint/manifest.json",
    output:
        "results/{model}/{calibration}/{method}/{budget}/dense_export/manifest.json",
    log:
        "results/logs/export_dense/{model}/{calibration}/{method}/{budget}.log",
    benchmark:
        "results/benchmarks/export_dense/{model}/{calibration}/{method}/{budget}.tsv"
    threads: 1
    resources:
        mem_mb=memory("export_dense", 16000),  # one file of weights, and one matrix in float64
        runtime=minutes(120),
    params:
        **stage("export_dense"),
    script:
        "../../scripts/export_dense.py"


rule exports:
    """Dense models of the experiments that ask for them."""
    input:
        made_of_cells("dense_export", PLAN.cells.exported()),
