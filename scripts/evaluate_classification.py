"""Rules `evaluate_classification` and `evaluate_classification_dense`: classes of the test rows, beside the dense model's."""

from winnow.checkpoint.loading import load_model
from winnow.data.examples import encode_rows
from winnow.data.tokens import check_length, load_tokenizer
from winnow.evaluation.classification import scores
from winnow.evaluation.predictions import outputs_of_classes, predict
from winnow.io.artifacts import Bundle, read_json, read_parquet, write_json
from winnow.jobs.start import start_job
from winnow.models.files import ModelFiles

if __name__ == "__main__":
    job = start_job(snakemake)
    spec = job.spec
    files, facts = ModelFiles(snakemake.input.model), read_json(snakemake.input.facts)
    check_length(spec["length"], files.manifest["max_length"])
    checkpoint = Bundle(snakemake.input.checkpoint) if snakemake.input.get("checkpoint") else None
    tokenizer = load_tokenizer(files.verify())
    model = load_model((checkpoint or files).verify(), spec["dtype"], job.device)
    outputs = outputs_of_classes(model, facts["labels"])
    examples = encode_rows(tokenizer, read_parquet(snakemake.input.test).head(spec["limit"]), spec["length"])
    own, labels = predict(model, examples, outputs, snakemake.resources.batch_rows), examples.labels.tolist()
    dense = read_json(snakemake.input.dense)["per_row"] if checkpoint else None
    correct = sum(a == b for a, b in zip(labels, own["predicted"], strict=True))
    block = files.dense_bytes(files.matrices)
    sizes = {"dense_bytes": block, "stored_bytes": block, "model_stored_bytes": files.manifest["bytes"]}
    if checkpoint:
        sizes = {key: checkpoint.manifest[key] for key in sizes}
    result = {
        "protocol": {key: spec[key] for key in ("length", "limit", "dtype")},
        "tasks": {spec["task"]: {"documents": len(labels), **facts}},
        "scores": {spec["task"]: scores(labels, own, len(facts["labels"]), dense)},
        "correct": correct,
        "count": len(labels),
        **sizes,
        "model_dense_bytes": files.manifest["bytes"],
        "checkpoint": str(checkpoint.directory if checkpoint else files.directory),
        "per_row": {"label": labels, **own},
    }
    write_json(snakemake.output[0], result, job.provenance)
