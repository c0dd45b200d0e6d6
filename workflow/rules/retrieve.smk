# needs: model directories, GGUF files or hub ids, texts      makes: manifests of models, rows of texts, windows of tokens
# steps: dequantize (GGUF files), retrieve_model, retrieve_text (the network: `snakemake prefetch`), check_overlap, tokenize;
#        models that are tuned first come from finetune.smk


rule dequantize:
    """Write the model of a GGUF file as safetensors, once, tensor by tensor."""
    input:
        file=local_files,
    output:
        "results/{model}/dequantized/manifest.json",
    log:
        "results/logs/dequantize/{model}.log",
    benchmark:
        "results/benchmarks/dequantize/{model}.tsv"
    threads: 1
    resources:
        mem_mb=memory("dequantize", 8000),  # the largest tensor in float32, and the vocabulary
        runtime=minutes(60),
    params:
        **stage("dequantize"),
    script:
        "../../scripts/dequantize.py"


rule retrieve_model:
    """Find or download a model; check its tensors one by one; record digests, shapes and canonical names."""
    input:
        unpack(model_as_compressed),
    output:
        "results/{model}/model.json",
    log:
        "results/logs/retrieve_model/{model}.log",
    benchmark:
        "results/benchmarks/retrieve_model/{model}.tsv"
    threads: 1
    resources:
        mem_mb=memory("retrieve_model", 4000),  # one tensor at a time
        runtime=minutes(120),  # a download of 16 GB
    params:
        **stage("retrieve_model"),
    script:
        "../../scripts/retrieve_model.py"


rule retrieve_text:
    """Read or download a text as rows."""
    input:
        files=text_files,
    output:
        "results/texts/{text}.parquet",
    log:
        "results/logs/retrieve_text/{text}.log",
    benchmark:
        "results/benchmarks/retrieve_text/{text}.tsv"
    threads: 1
    resources:
        mem_mb=memory("retrieve_text", 4000),
        runtime=minutes(60),
    params:
        **stage("retrieve_text"),
    script:
        "../../scripts/retrieve_text.py"


rule check_overlap:
    """Refuse a calibration text that shares passages with an evaluation text."""
    input:
        calibration="results/texts/{text}.parquet",
        evaluation="results/texts/{other}.parquet",
    output:
        "results/texts/overlap/{text}/{other}.json",
    log:
        "results/logs/check_overlap/{text}/{other}.log",
    benchmark:
        "results/benchmarks/check_overlap/{text}/{other}.tsv"
    threads: 1
    resources:
        mem_mb=memory("check_overlap", 8000),  # 16 bytes a word
        runtime=minutes(20),
    params:
        **stage("check_overlap"),
    script:
        "../../scripts/check_overlap.py"


rule tokenize:
    """Cut a text into windows of token ids, as its calibration or evaluation preset says."""
    input:
        model="results/{model}/model.json",
        text=text_of_windows,
    output:
        "results/{model}/tokens/{windows}.safetensors",
    log:
        "results/logs/tokenize/{model}/{windows}.log",
    benchmark:
        "results/benchmarks/tokenize/{model}/{windows}.tsv"
    wildcard_constraints:
        windows=PLAN.windows_of("text"),
    threads: 1
    resources:
        mem_mb=memory("tokenize", 4000),
        runtime=minutes(20),
    params:
        **stage("tokenize"),
    script:
        "../../scripts/tokenize.py"


rule prefetch:
    """Everything that needs the network: models, texts and tasks of the configured experiments."""
    input:
        sources_of_cells(),
        texts_of_cells(),
        tasks_of_cells(),
        examples_of_cells(),


rule tokens:
    """Windows of all calibrations and evaluations."""
    input:
        windows_of_cells(),
