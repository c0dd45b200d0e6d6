# needs: factors, spectra, predicted losses where the allocation asks for them, a budget      makes: sizes of every group, compressed checkpoints, dense models of them
# steps: compress, export_dense (where an experiment says `export: dense`)


rule compress:
    """Turn the budget into one size per group, cut the factors to it and write a checkpoint that `from_pretrained` loads."""
    input:
        model="results/{model}/model.json",
        factors=factors_of_method,
        spectra="results/{model}/{calibration}/{method}/spectra.parquet",
        predicted=predicted_for_budget,
    output:
        allocation="results/{model}/{calibration}/{method}/{budget}/allocation.json",
        checkpoint="results/{model}/{calibration}/{method}/{budget}/checkpoint/manifest.json",
    log:
        "results/logs/compress/{model}/{calibration}/{method}/{budget}.log",
    benchmark:
        "results/benchmarks/compress/{model}/{calibration}/{method}/{budget}.tsv"
    threads: 1
    resources:
        mem_mb=16000,  # the weights in their stored dtype
        runtime=60,
    params:
        **stage("compress"),
    script:
        "../../scripts/compress.py"


rule checkpoints:
    """Compressed checkpoints of all cells."""
    input:
        of_cells(
            "results/{model}/{calibration}/{method}/{budget}/checkpoint/manifest.json"
        ),


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
        mem_mb=16000,  # one file of weights, and one matrix in float64
        runtime=120,
    params:
        **stage("export_dense"),
    script:
        "../../scripts/export_dense.py"


rule exports:
    """Dense models of the experiments that ask for them."""
    input:
        of_cells(
            "results/{model}/{calibration}/{method}/{budget}/dense_export/manifest.json",
            cells=PLAN.exported(),
        ),
