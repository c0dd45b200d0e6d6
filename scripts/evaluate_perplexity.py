"""Rules `evaluate_perplexity` and `evaluate_dense`: loss per window, sums and means, beside the dense model's."""

from winnow.io import Bundle, read_json, read_tensors, write_json
from winnow.loading import load_model
from winnow.models import ModelFiles
from winnow.perplexity import evaluate, summarize
from winnow.resume import Resume
from winnow.runtime import start_job

if __name__ == "__main__":
    job = start_job(snakemake)
    spec = job.spec
    files = ModelFiles(snakemake.input.model)
    checkpoint = Bundle(snakemake.input.checkpoint) if snakemake.input.get("checkpoint") else None
    model = load_model((checkpoint or files).verify(), spec["dtype"], job.device)
    reference = load_model(files.verify(), spec["dtype"], job.device) if checkpoint and spec["compare"] else None
    tokens, facts = read_tensors(snakemake.input.tokens, sealed=True)
    batch = max(1, snakemake.resources.batch_tokens // spec["length"])
    resume = Resume(snakemake.output[0], job.provenance)
    rows = evaluate(model, reference, tokens["ids"], tokens["first"], batch, resume)
    dense = read_json(snakemake.input.dense) if checkpoint else None
    block = files.dense_bytes(files.matrices)
    sizes = {"dense_bytes": block, "stored_bytes": block, "model_stored_bytes": files.manifest["bytes"]}
    if checkpoint:
        sizes = {key: checkpoint.manifest[key] for key in sizes}
    result = {
        "protocol": {key: spec[key] for key in ("protocol", "protocol_version", "rule", "length", "stride", "dtype")},
        "text": {key: facts[key] for key in ("text_digest", "text_tokens", "bos")},
        **summarize(rows, dense),
        **sizes,
        "model_dense_bytes": files.manifest["bytes"],
        "checkpoint": str(checkpoint.directory if checkpoint else files.directory),
        "per_window": rows,
    }
    write_json(snakemake.output[0], result, job.provenance)
    resume.clear()
