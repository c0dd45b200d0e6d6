# needs: the cells of a study, weights and statistics      makes: results/studies/{study}/: tables, figures, claims with verdicts
# steps: measure_study (per model), conclude_study; study_<name> is the target


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
        mem_mb=16000,  # the matrices of one role in all layers in float64, or the model and sums of all its blocks
        runtime=240,
    params:
        **stage("measure_study"),
    script:
        "../../scripts/measure_study.py"


rule conclude_study:
    """Tables and figures of a study, and a verdict on each of its claims."""
    input:
        cells=lambda w: [PLAN.result(cell) for cell, _ in PLAN.study_cells(w.study)],
        measured=lambda w: [
            PLAN.study_measurement(w.study, cell)
            for cell in PLAN.study_models().values()
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


for study in studies.names():

    rule:
        name:
            f"study_{study}"
        input:
            f"results/studies/{study}/manifest.json",
