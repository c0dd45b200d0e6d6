# needs: checkpoints or models, windows of calibration tokens      makes: recovered checkpoints, dense models of them
# steps: recover, for compressed models; recover_dense, by the same script, for the dense one; export_dense_recovered


rule recover:
    """Win back quality of a checkpoint on the calibration windows, its bytes unchanged."""
    input:
        model="results/{model}/model.json",
        tokens="results/{model}/tokens/{calibration}.safetensors",
        train=rows_of_recovery("train.parquet"),
        facts=rows_of_recovery("task.json"),
        gradients=gradients_of_recovery,
        checkpoint=before_recovery(
            "results/{model}/{calibration}/{method}/{budget}",
            "results/{model}/{calibration}/{method}/{budget}/checkpoint/manifest.json",
        ),
    output:
        "results/{model}/{calibration}/{method}/{budget}/{recovery}/checkpoint/manifest.json",
    log:
        "results/logs/recover/{model}/{calibration}/{method}/{budget}/{recovery}.log",
    benchmark:
        "results/benchmarks/recover/{model}/{calibration}/{method}/{budget}/{recovery}.tsv"
    wildcard_constraints:
        recovery=PLAN.pattern("recoveries", kind="recovers"),
    threads: 2
    resources:
        gpu=1,
        stream=streamed,  # 1: a block at a time where the recovery can do so, as the model's `load` says
        mem_mb=memory("recover", 32000),  # the compressed and the dense model in float32, and what Adam keeps
        runtime=minutes(480),
    params:
        **stage("recover"),
    script:
        "../../scripts/recover.py"


use rule recover as recover_dense with:
    input:
        model="results/{model}/model.json",
        tokens="results/{model}/tokens/{calibration}.safetensors",
        train=rows_of_recovery("train.parquet"),
        facts=rows_of_recovery("task.json"),
        checkpoint=before_recovery("results/{model}/{calibration}/dense", []),
    output:
        "results/{model}/{calibration}/dense/{recovery}/checkpoint/manifest.json",
    log:
        "results/logs/recover_dense/{model}/{calibration}/{recovery}.log",
    benchmark:
        "results/benchmarks/recover_dense/{model}/{calibration}/{recovery}.tsv"


use rule export_dense as export_dense_recovered with:
    input:
        rules.recover.output,
    output:
        "results/{model}/{calibration}/{method}/{budget}/{recovery}/dense_export/manifest.json",
    log:
        "results/logs/export_dense_recovered/{model}/{calibration}/{method}/{budget}/{recovery}.log",
    benchmark:
        "results/benchmarks/export_dense_recovered/{model}/{calibration}/{method}/{budget}/{recovery}.tsv"


rule recoveries:
    """Recovered checkpoints of all cells, and the dense models after the same recoveries."""
    input:
        recovered_of_cells(),
