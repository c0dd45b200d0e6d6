"""Rule `finetune`: a model trained as a classifier on the train rows of a task, as a Hugging Face directory."""

from pathlib import Path

from winnow.data.examples import encode_rows
from winnow.data.tokens import load_tokenizer
from winnow.io.artifacts import atomic, read_json, read_parquet, write_manifest
from winnow.io.resume import Resume
from winnow.jobs.start import start_job
from winnow.training.finetune import load_base, train_classifier, verified, write_tuned
from winnow.training.options import Tuning

if __name__ == "__main__":
    job = start_job(snakemake)
    tuning, length = Tuning(**{key: value for key, value in job.spec.items() if key != "length"}), job.spec["length"]
    base, labels = read_json(snakemake.input.base), read_json(snakemake.input.facts)["labels"]
    source = verified(base)
    tokenizer = load_tokenizer(source)
    model = load_base(source, labels, tokenizer, tuning.seed, job.device)
    examples = encode_rows(tokenizer, read_parquet(snakemake.input.train), length)
    folder, resume = Path(snakemake.output[0]).parent, Resume(Path(snakemake.output[0]).parent, job.provenance)
    report = train_classifier(model, examples, list(range(len(labels))), tuning, resume)
    with atomic(folder) as partial:
        write_tuned(partial, model, source, list(base["files"]))
        write_manifest(partial, {"tuning": job.spec, "labels": labels, **report}, job.provenance)
    resume.clear()
