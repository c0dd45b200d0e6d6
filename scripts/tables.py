"""Rule `tables`: the summary with one row per evaluated cell, including dense ones; and the table over calibration seeds."""

from typing import TYPE_CHECKING

from winnow.io.artifacts import read_json, write_parquet, write_text
from winnow.jobs.start import start_job
from winnow.reporting.tables import spread, summary

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.Tables" = job.spec
    rows = spec["rows"]
    results = {row["result"]: read_json(row["result"]) for row in rows}
    for name, table in (("summary", summary(rows, results)), ("spread", spread(rows, results))):
        csv, parquet = snakemake.output[name]
        write_text(csv, table.to_csv(index=False))
        write_parquet(parquet, table, job.provenance)
