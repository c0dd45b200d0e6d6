"""Rules `tabulate_*`, for every kind of evaluation with a table: one or more rows per cell, including dense ones."""

from winnow.evaluation.table import tabulated
from winnow.io.artifacts import read_json, write_parquet, write_text
from winnow.jobs.start import start_job

if __name__ == "__main__":
    job = start_job(snakemake)
    table, rows = job.spec["table"], job.spec["rows"]
    frame = tabulated(table, rows, {row["result"]: read_json(row["result"]) for row in rows})
    write_parquet(snakemake.output.parquet, frame, job.provenance)
    write_text(snakemake.output.csv, frame.to_csv(index=False))
