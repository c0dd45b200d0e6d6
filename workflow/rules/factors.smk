# needs: weights, and statistics where the metric asks for them      makes: factors of every rank, spectra
# steps: assign_clusters, factorize (a shard of the layers per job), measure_spectra, predict_losses (where a budget's
#        allocation asks for it)


rule assign_clusters:
    """Assign the channels of every matrix to clusters, once for all methods that cluster alike."""
    input:
        model="results/{model}/model.json",
        moments=moments_of_clustering,
    output:
        "results/{model}/{calibration}/clusters/{clustering}.parquet",
    log:
        "results/logs/assign_clusters/{model}/{calibration}/{clustering}.log",
    benchmark:
        "results/benchmarks/assign_clusters/{model}/{calibration}/{clustering}.tsv"
    threads: 1
    resources:
        mem_mb=memory("assign_clusters", 8000),  # one layer's statistics and k-means on one matrix
        runtime=minutes(60),
    params:
        **stage("assign_clusters"),
    script:
        "../../scripts/assign_clusters.py"


rule factorize:
    """Fit every group of matrices once, for all sizes up to the break-even size."""
    input:
        model="results/{model}/model.json",
        moments=fitted_with("moments"),
        gradients=fitted_with("gradients"),
        clusters=fitted_with("clusters"),
        outer=fitted_with("outer"),
    output:
        "results/{model}/{calibration}/{method}/factors/{shard}/manifest.json",
    log:
        "results/logs/factorize/{model}/{calibration}/{method}/{shard}.log",
    benchmark:
        "results/benchmarks/factorize/{model}/{calibration}/{method}/{shard}.tsv"
    threads: 1
    resources:
        gpu=1,
        mem_mb=memory("factorize", 16000),  # one group in float64 with its Gram matrix and work space
        runtime=minutes(60),
    params:
        **stage("factorize"),
    script:
        "../../scripts/factorize.py"


rule measure_spectra:
    """Singular values, error at every size and effective ranks of all groups, in the method's metric."""
    input:
        factors_of_method,
    output:
        "results/{model}/{calibration}/{method}/spectra.parquet",
    log:
        "results/logs/measure_spectra/{model}/{calibration}/{method}.log",
    benchmark:
        "results/benchmarks/measure_spectra/{model}/{calibration}/{method}.tsv"
    threads: 1
    resources:
        mem_mb=memory("measure_spectra", 4000),
        runtime=minutes(20),
    params:
        **stage("measure_spectra"),
    script:
        "../../scripts/measure_spectra.py"


rule predict_losses:
    """The loss that every size of every group is predicted to cost, for allocations that ask for it."""
    input:
        model="results/{model}/model.json",
        moments="results/{model}/{calibration}/statistics/moments/manifest.json",
        gradients="results/{model}/{calibration}/statistics/gradients/manifest.json",
        outer=lambda w: PLAN.paths.outer(w.model, w.calibration, w.method),
        factors=factors_of_method,
    output:
        "results/{model}/{calibration}/{method}/predicted.parquet",
    log:
        "results/logs/predict_losses/{model}/{calibration}/{method}.log",
    benchmark:
        "results/benchmarks/predict_losses/{model}/{calibration}/{method}.tsv"
    threads: 1
    resources:
        gpu=1,
        mem_mb=memory("predict_losses", 16000),  # one group in float64 with both second moments
        runtime=minutes(60),
    params:
        **stage("predict_losses"),
    script:
        "../../scripts/predict_losses.py"


rule factors:
    """Factors of all methods."""
    input:
        of_methods("factors/{shard}/manifest.json"),


rule clusters:
    """Assignments of clusters of all methods that have them."""
    input:
        clusters_of_cells(),


rule spectra:
    """Spectra of all methods."""
    input:
        of_methods("spectra.parquet"),
