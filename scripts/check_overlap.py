"""Rules `check_overlap` and `check_rows`: the job fails if a calibration text shares passages with evaluation data."""

from winnow.data.rows import check_rows, texts_of
from winnow.data.texts import check_overlap
from winnow.io.artifacts import read_parquet, write_json
from winnow.jobs.start import start_job

if __name__ == "__main__":
    job = start_job(snakemake)
    calibration = list(read_parquet(snakemake.input.calibration)["text"])
    rows = read_parquet(snakemake.input.evaluation)
    evaluation = texts_of(rows)
    names = (snakemake.wildcards.text, snakemake.wildcards.get("other") or snakemake.wildcards.task)
    result = {"calibration": names[0], "evaluation": names[1], **check_overlap(calibration, evaluation, names)}
    if job.provenance["rule"] == "check_rows":
        result |= check_rows(calibration, rows, names)
    write_json(snakemake.output[0], result, job.provenance)
