# needs: perplexity JSON, allocations and spectra of all cells, manifests of models      makes: tables, figures, one self-contained HTML report
# steps: tables, figures, report


rule tables:
    """One row per evaluated cell; and one per configuration, with the spread over its calibration seeds."""
    input:
        results_of("perplexity"),
    output:
        summary=multiext("results/tables/summary", ".csv", ".parquet"),
        spread=multiext("results/tables/spread", ".csv", ".parquet"),
    log:
        "results/logs/tables.log",
    benchmark:
        "results/benchmarks/tables.tsv"
    localrule: True
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        **stage("tables"),
    script:
        "../../scripts/tables.py"


rule figures:
    """Loss and KL against bytes, methods in order, and effective rank against depth; each as SVG and PNG."""
    input:
        summary="results/tables/summary.parquet",
        models=of_cells("results/{model}/model.json", "perplexity"),
        spectra=spectra_of_matrices(),
    output:
        frontier=multiext("results/figures/frontier", ".svg", ".png"),
        ranking=multiext("results/figures/ranking", ".svg", ".png"),
        spectra=multiext("results/figures/effective_rank", ".svg", ".png"),
    log:
        "results/logs/figures.log",
    benchmark:
        "results/benchmarks/figures.tsv"
    localrule: True
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        **stage("figures"),
    script:
        "../../scripts/figures.py"


rule report:
    """A single HTML file that opens without a network.

    It also tells the seconds and the memory of the jobs behind its rows, from the benchmark files and logs that are beside the
    results when it is made. These are no inputs: they are written by the same jobs as the results and no number depends on them,
    so a report does not become out of date by a job that is timed again with the same result.
    """
    input:
        summary="results/tables/summary.parquet",
        spread="results/tables/spread.parquet",
        ranking="results/figures/ranking.svg",
        spectra="results/figures/effective_rank.svg",
        results=results_of("perplexity"),
        overlaps=overlaps_of_cells(),
        moments=moments_of_cells(),
        allocations=of_cells(
            "results/{model}/{calibration}/{method}/{budget}/allocation.json",
            "perplexity",
        ),
        models=of_cells("results/{model}/model.json", "perplexity"),
    output:
        "results/report.html",
    log:
        "results/logs/report.log",
    benchmark:
        "results/benchmarks/report.tsv"
    localrule: True
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        **stage("report"),
    script:
        "../../scripts/report.py"
