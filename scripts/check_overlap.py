"""Rule `check_overlap`: the job fails if a calibration text shares passages with an evaluation text."""

from winnow.io import read_parquet, write_json
from winnow.runtime import start_job
from winnow.texts import check_overlap

if __name__ == "__main__":
    job = start_job(snakemake)
    calibration = list(read_parquet(snakemake.input.calibration)["text"])
    evaluation = list(read_parquet(snakemake.input.evaluation)["text"])
    names = (snakemake.wildcards.text, snakemake.wildcards.other)
    result = {"calibration": names[0], "evaluation": names[1], **check_overlap(calibration, evaluation, names)}
    write_json(snakemake.output[0], result, job.provenance)
