"""Rule `tables`: the summary, one row per evaluated cell, dense rows included."""

from winnow.io import read_json, write_parquet, write_text
from winnow.runtime import start_job
from winnow.tables import summary

if __name__ == "__main__":
    job = start_job(snakemake)
    table = summary(job.spec["rows"], {row["result"]: read_json(row["result"]) for row in job.spec["rows"]})
    write_parquet(snakemake.output.parquet, table, job.provenance)
    write_text(snakemake.output.csv, table.to_csv(index=False))
