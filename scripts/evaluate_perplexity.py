"""Rules `evaluate_perplexity` and `evaluate_dense`: loss per window, sums and means, beside the dense model's."""

from winnow.checkpoint.loading import load_model
from winnow.checkpoint.streaming import NAMES, Streamed, clear_left
from winnow.evaluation.perplexity import evaluate, evaluate_by_block, summarize
from winnow.io.artifacts import Bundle, read_json, read_tensors, write_json
from winnow.io.resume import Resume
from winnow.jobs.start import start_job
from winnow.models.files import ModelFiles

if __name__ == "__main__":
    job = start_job(snakemake)
    spec = job.spec
    files = ModelFiles(snakemake.input.model)
    checkpoint = Bundle(snakemake.input.checkpoint) if snakemake.input.get("checkpoint") else None
    directories = [(checkpoint or files).verify()]
    if checkpoint and spec["compare"]:
        directories.append(files.verify())
    tokens, facts = read_tensors(snakemake.input.tokens, sealed=True)
    windows = (tokens["ids"], tokens["first"], max(1, snakemake.resources.batch_tokens // spec["length"]))
    resume, where = Resume(snakemake.output[0], job.provenance), (spec["dtype"], job.device)
    if snakemake.resources.stream:
        place = (snakemake.output[0], tokens["ids"].shape[1], job.provenance)
        streamed = [Streamed(path, *where, *place, name) for path, name in zip(directories, NAMES, strict=False)]
        rows = evaluate_by_block(streamed[0], streamed[1] if streamed[1:] else None, *windows, resume)
    else:
        models = [load_model(path, *where) for path in directories]
        rows = evaluate(models[0], models[1] if models[1:] else None, *windows, resume)
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
    clear_left(snakemake.output[0])
