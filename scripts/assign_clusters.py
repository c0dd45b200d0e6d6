"""Rule `assign_clusters`: one row per clustered channel of every matrix that the structure clusters."""

import pandas as pd

from winnow.calibration.clusters import Clustering, assign_all
from winnow.io.artifacts import Bundle, write_parquet
from winnow.jobs.start import start_job
from winnow.models.files import ModelFiles

if __name__ == "__main__":
    job = start_job(snakemake)
    moments = Bundle(snakemake.input.moments) if snakemake.input.get("moments") else None
    clustering = Clustering.model_validate(job.spec["clustering"])
    rows = [pd.DataFrame(part) for part in assign_all(ModelFiles(snakemake.input.model), moments, clustering)]
    write_parquet(snakemake.output[0], pd.concat(rows, ignore_index=True), job.provenance)
