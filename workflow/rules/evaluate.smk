# needs: models or checkpoints, windows of evaluation tokens      makes: perplexity JSON, cards with the numbers
# steps: evaluate_perplexity, for compressed models; by the same script evaluate_dense, for the dense one, and
#        evaluate_perplexity_healed, for the dense one after a recovery; cards


rule evaluate_dense:
    """Loss of the dense model: the row that every other is compared with."""
    input:
        model="results/{model}/model.json",
        tokens="results/{model}/tokens/{evaluation}.safetensors",
    output:
        "results/{model}/dense/{evaluation}.json",
    log:
        "results/logs/evaluate_dense/{model}/{evaluation}.log",
    benchmark:
        "results/benchmarks/evaluate_dense/{model}/{evaluation}.tsv"
    wildcard_constraints:
        evaluation=PLAN.pattern("evaluations", kind="perplexity"),
    threads: 1
    resources:
        gpu=1,
        batch_tokens=4096,  # per forward pass; --set-resources changes it, and no number beyond rounding
        stream=streamed,  # 1: the weights of one block at a time, as the model's `load` says
        mem_mb=memory("evaluate_dense", 16000),
        runtime=minutes(60),
    params:
        **stage("evaluate_perplexity"),
    script:
        "../../scripts/evaluate_perplexity.py"


rule evaluate_perplexity:
    """Loss of a compressed model, paired by window with the dense model's."""
    input:
        model="results/{model}/model.json",
        tokens="results/{model}/tokens/{evaluation}.safetensors",
        dense="results/{model}/dense/{evaluation}.json",
        checkpoint=evaluated_checkpoint,
        overlap=overlap_check,
    output:
        "results/{model}/{calibration}/{method}/{budget}/{recovery}/{evaluation}.json",
    log:
        "results/logs/evaluate_perplexity/{model}/{calibration}/{method}/{budget}/{recovery}/{evaluation}.log",
    benchmark:
        "results/benchmarks/evaluate_perplexity/{model}/{calibration}/{method}/{budget}/{recovery}/{evaluation}.tsv"
    wildcard_constraints:
        evaluation=PLAN.pattern("evaluations", kind="perplexity"),
    threads: 1
    resources:
        gpu=1,
        batch_tokens=4096,  # per forward pass; --set-resources changes it, and no number beyond rounding
        stream=streamed,  # 1: the weights of one block at a time, as the model's `load` says
        mem_mb=memory("evaluate_perplexity", 24000),  # the compressed and the dense model
        runtime=minutes(60),
    params:
        **stage("evaluate_perplexity"),
    script:
        "../../scripts/evaluate_perplexity.py"


use rule evaluate_perplexity as evaluate_perplexity_healed with:
    input:
        model="results/{model}/model.json",
        tokens="results/{model}/tokens/{evaluation}.safetensors",
        dense="results/{model}/dense/{evaluation}.json",
        checkpoint="results/{model}/{calibration}/dense/{recovery}/checkpoint/manifest.json",
        overlap=overlap_check,
    output:
        "results/{model}/{calibration}/dense/{recovery}/{evaluation}.json",
    log:
        "results/logs/evaluate_perplexity_healed/{model}/{calibration}/{recovery}/{evaluation}.log",
    benchmark:
        "results/benchmarks/evaluate_perplexity_healed/{model}/{calibration}/{recovery}/{evaluation}.tsv"


rule perplexity:
    """Perplexity of all cells that measure it, dense ones included."""
    input:
        results_of("perplexity"),


rule cards:
    """The README of every checkpoint with its numbers, which are known only after the checkpoint is finished."""
    input:
        results=rules.perplexity.input,  # they change with the checkpoints that the cards describe
    output:
        "results/cards.json",  # the cards, {recovery}/README.md, are as many as cells: Snakemake would keep a record of each
    log:
        "results/logs/cards.log",
    benchmark:
        "results/benchmarks/cards.tsv"
    localrule: True
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        **stage("cards"),
    script:
        "../../scripts/cards.py"
