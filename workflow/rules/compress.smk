# needs: factors, spectra, a budget      makes: sizes of every group, compressed checkpoints, dense models of them
# steps: allocate, compress, export_dense (where an experiment says `export: dense`)


rule allocate:
    """Turn a budget into one size per group of matrices."""
    input:
        model="results/{model}/model.json",
        spectra="results/{model}/{calibration}/{method}/spectra.parquet",
    output:
        "results/{model}/{calibration}/{method}/{budget}/allocation.json",
    log:
        "results/logs/allocate/{model}/{calibration}/{method}/{budget}.log",
    benchmark:
        "results/benchmarks/allocate/{model}/{calibration}/{method}/{budget}.tsv"
    threads: 1
    resources:
        mem_mb=4000,
        runtime=20,
    params:
        **stage("allocate"),
    script:
        "../../scripts/allocate.py"


rule compress:
    """Cut the factors to size and write a checkpoint that `from_pretrained` loads."""
    input:
        model="results/{model}/model.json",
        factors=factors_of_method,
        allocation="results/{model}/{calibration}/{method}/{budget}/allocation.json",
    output:
        "results/{model}/{calibration}/{method}/{budget}/checkpoint/manifest.json",
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
