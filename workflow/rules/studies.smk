# needs: the cells of a study, weights and statistics      makes: results/studies/{study}/: tables, figures, claims with verdicts
# steps: measure_study (per model), conclude_study; study_<name> is the target of one, studies the page of all


rule measure_study:
    """What a study measures on a model's weights and statistics."""
    input:
        unpack(read_by_study),
        model="results/{model}/model.json",
    output:
        "results/{model}/{calibration}/studies/{study}.json",
    log:
        "results/logs/measure_study/{model}/{calibration}/{study}.log",
    benchmark:
        "results/benchmarks/measure_study/{model}/{calibration}/{study}.tsv"
    threads: ALL_CORES
    resources:
        gpu=1,
        mem_mb=memory("measure_study", 16000),  # the matrices of one role in all layers in float64, or the model and sums of all its blocks
        runtime=minutes(240),
    params:
        **stage("measure_study"),
    script:
        "../../scripts/measure_study.py"


rule conclude_study:
    """Tables and figures of a study, and a verdict on each of its claims."""
    input:
        cells=lambda w: [
            PLAN.paths.result(cell) for cell, _ in PLAN.studies.of(w.study)
        ],
        scores=lambda w: [
            PLAN.paths.result(cell) for cell, _ in PLAN.studies.scores(w.study)
        ],
        measured=lambda w: [
            PLAN.paths.measurement(w.study, cell)
            for cell in PLAN.studies.models().values()
        ],
    output:
        "results/studies/{study}/manifest.json",
    log:
        "results/logs/conclude_study/{study}.log",
    benchmark:
        "results/benchmarks/conclude_study/{study}.tsv"
    localrule: True
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        **stage("conclude_study"),
    script:
        "../../scripts/conclude_study.py"


for study in STUDIES:

    rule:
        name:
            f"study_{study}"
        input:
            f"results/studies/{study}/manifest.json",


rule studies:
    """All papers on one page: claims with verdicts, figures, tables, and how each number was made."""
    input:
        expand("results/studies/{study}/manifest.json", study=list(PLAN.of_studies)),
    output:
        "results/studies/index.html",
    log:
        "results/logs/studies.log",
    benchmark:
        "results/benchmarks/studies.tsv"
    localrule: True
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        **stage("studies"),
    script:
        "../../scripts/studies.py"
