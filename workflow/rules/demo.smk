# needs: a Python installation      makes: the texts and the model of the embedded default, anew, below results/demo
# steps: demo_texts, demo_model. Neither is part of a normal run: what they made is in resources/.


rule demo_texts:
    """Collect the documents of this Python installation and cut them into three parts."""
    output:
        expand(
            "results/demo/texts/{part}.jsonl",
            part=["train", "calibration", "evaluation"],
        ),
    log:
        "results/logs/demo_texts.log",
    benchmark:
        "results/benchmarks/demo_texts.tsv"
    threads: 1
    resources:
        mem_mb=memory("demo_texts", 2000),
        runtime=minutes(10),
    params:
        **stage("demo_texts"),
    script:
        "../../scripts/demo_texts.py"


rule demo_model:
    """Train the demo model on resources/texts/demo; about a quarter of an hour on two cores."""
    input:
        train="resources/texts/demo/train.jsonl",
        evaluation="resources/texts/demo/evaluation.jsonl",
    output:
        "results/demo/model/README.md",
    log:
        "results/logs/demo_model.log",
    benchmark:
        "results/benchmarks/demo_model.tsv"
    threads: 2
    resources:
        mem_mb=memory("demo_model", 4000),
        runtime=minutes(60),
    params:
        **stage("demo_model"),
    script:
        "../../scripts/demo_model.py"
