"""Rules `evaluate_accuracy` and `evaluate_accuracy_dense`: scores on tasks, per document, beside the dense model's."""

from winnow.checkpoint.loading import load_model
from winnow.data.tasks import check_documents, load_tasks, stay_offline
from winnow.data.tokens import load_tokenizer
from winnow.evaluation.accuracy import against, score
from winnow.io.artifacts import Bundle, read_json, write_json
from winnow.jobs.start import start_job
from winnow.models.files import ModelFiles

if __name__ == "__main__":
    job = start_job(snakemake)
    spec = job.spec
    stay_offline()
    files = ModelFiles(snakemake.input.model)
    checkpoint = Bundle(snakemake.input.checkpoint) if snakemake.input.get("checkpoint") else None
    facts = read_json(snakemake.input.tasks)["tasks"]
    tasks = load_tasks(spec)
    check_documents(tasks, facts, spec["limit"])
    tokenizer = load_tokenizer(files.verify())
    model = load_model((checkpoint or files).verify(), spec["dtype"], job.device)
    scores = score(model, tokenizer, tasks, spec["num_fewshot"], spec["limit"], snakemake.resources.batch_requests)
    if checkpoint:
        scores = against(scores, read_json(snakemake.input.dense)["scores"])
    block = files.dense_bytes(files.matrices)
    sizes = {"dense_bytes": block, "stored_bytes": block, "model_stored_bytes": files.manifest["bytes"]}
    if checkpoint:
        sizes = {key: checkpoint.manifest[key] for key in sizes}
    result = {
        "protocol": {key: spec[key] for key in ("num_fewshot", "limit", "dtype")},
        "tasks": facts,
        "scores": scores,
        **sizes,
        "model_dense_bytes": files.manifest["bytes"],
        "checkpoint": str(checkpoint.directory if checkpoint else files.directory),
    }
    write_json(snakemake.output[0], result, job.provenance)
