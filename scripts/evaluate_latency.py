"""Rules `evaluate_latency` and `evaluate_latency_dense`: times in turns with the dense model, memory, FLOPs and bytes read."""

from winnow.checkpoint.loading import load_model
from winnow.evaluation.latency import evaluate
from winnow.io.artifacts import Bundle, write_json
from winnow.jobs.start import start_job
from winnow.models.files import ModelFiles

if __name__ == "__main__":
    job = start_job(snakemake)
    spec = job.spec
    files = ModelFiles(snakemake.input.model)
    checkpoint = Bundle(snakemake.input.checkpoint) if snakemake.input.get("checkpoint") else None
    dense = load_model(files.verify(), spec["dtype"], job.device)
    model = load_model(checkpoint.verify(), spec["dtype"], job.device) if checkpoint else None
    block = files.dense_bytes(files.matrices)
    sizes = {"dense_bytes": block, "stored_bytes": block}
    if checkpoint:
        sizes = {key: checkpoint.manifest[key] for key in sizes}
    result = {
        "protocol": {key: spec[key] for key in ("batches", "prompts", "decode", "repeats", "warm_up", "dtype")},
        **evaluate(dense, model, spec, job.device),
        **sizes,
        "checkpoint": str(checkpoint.directory if checkpoint else files.directory),
    }
    write_json(snakemake.output[0], result, job.provenance)
