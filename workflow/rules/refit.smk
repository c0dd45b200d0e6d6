# needs: what compress.smk does, and statistics      makes: the same checkpoints
# steps: compress_refitted, in the place of `compress` for models whose preset says `factors: refitted`


use rule compress as compress_refitted with:
    log:
        "results/logs/compress_refitted/{model}/{calibration}/{method}/{budget}.log",
    benchmark:
        "results/benchmarks/compress_refitted/{model}/{calibration}/{method}/{budget}.tsv"
    wildcard_constraints:
        model=PLAN.models_of_factors("refitted"),
    resources:
        gpu=1,
        mem_mb=memory("compress_refitted", 16000),  # one group in float64, as in `factorize`
        runtime=minutes(240),
