"""Rules `tabulate_*`, for every kind of evaluation with a table: one or more rows per cell, including dense ones."""

from typing import TYPE_CHECKING

from winnow.evaluation.table import tabulated
from winnow.io.artifacts import read_json, write_parquet, write_text
from winnow.jobs.start import start_job

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.Tabulate" = job.spec
    table, rows = spec["table"], spec["rows"]
    frame = tabulated(table, rows, {row["result"]: read_json(row["result"]) for row in rows})
    write_parquet(snakemake.output.parquet, frame, job.provenance)
    write_text(snakemake.output.csv, frame.to_csv(index=False))
