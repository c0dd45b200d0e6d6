"""Rule `tabulate_accuracy`: one row per evaluated cell, task and measure, dense rows included."""

from winnow.evaluation.accuracy_table import accuracy_table
from winnow.io.artifacts import read_json, write_parquet, write_text
from winnow.jobs.start import start_job

if __name__ == "__main__":
    job = start_job(snakemake)
    table = accuracy_table(job.spec["rows"], {row["result"]: read_json(row["result"]) for row in job.spec["rows"]})
    write_parquet(snakemake.output.parquet, table, job.provenance)
    write_text(snakemake.output.csv, table.to_csv(index=False))
