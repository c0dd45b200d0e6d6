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
        spec={
            "vocab_size": 1024,
            "shape": {
                "hidden_size": 128,
                "intermediate_size": 352,
                "num_hidden_layers": 6,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "tie_word_embeddings": True,
            },
            "training": {
                "steps": 800,
                "batch": 16,
                "length": 256,
                "rate": 0.003,
                "decay": 0.5,
                "seed": 0,
            },
        },
    script:
        "../../scripts/demo_model.py"
