"""Rule `retrieve_text`: a text as a table of rows."""

import pandas as pd

from winnow.data.texts import read_rows
from winnow.io.artifacts import write_parquet
from winnow.jobs.start import start_job

if __name__ == "__main__":
    job = start_job(snakemake)
    rows = read_rows(job.spec)
    write_parquet(snakemake.output[0], pd.DataFrame({"text": rows}), job.provenance)
