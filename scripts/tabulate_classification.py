"""Rule `tabulate_classification`: one row per evaluated cell and measure, dense rows included."""

from winnow.evaluation.classification_table import classification_table
from winnow.io.artifacts import read_json, write_parquet, write_text
from winnow.jobs.start import start_job

if __name__ == "__main__":
    job = start_job(snakemake)
    table = classification_table(job.spec["rows"], {row["result"]: read_json(row["result"]) for row in job.spec["rows"]})
    write_parquet(snakemake.output.parquet, table, job.provenance)
    write_text(snakemake.output.csv, table.to_csv(index=False))
