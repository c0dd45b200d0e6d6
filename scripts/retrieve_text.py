"""Rule `retrieve_text`: a text as a table of rows."""

import pandas as pd

from winnow.io import write_parquet
from winnow.runtime import start_job
from winnow.texts import read_rows

if __name__ == "__main__":
    job = start_job(snakemake)
    rows = read_rows(job.spec)
    write_parquet(snakemake.output[0], pd.DataFrame({"text": rows}), job.provenance)
