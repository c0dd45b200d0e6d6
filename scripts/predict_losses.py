"""Rule `predict_losses`: one row per group of matrices, the loss that each of its sizes is predicted to cost."""

import logging

from winnow.io import Bundle, write_parquet
from winnow.models import ModelFiles
from winnow.prediction import predict, table_of
from winnow.runtime import start_job
from winnow.structures import structure_of

if __name__ == "__main__":
    job = start_job(snakemake)
    given = snakemake.input
    factors = {name: bundle for bundle in map(Bundle, given.factors) for name in bundle.manifest["groups"]}
    moments, options = Bundle(given.moments), (factors, structure_of(job.spec["structure"]), job.device)
    for line in moments.manifest["few_tokens"]:
        logging.warning(line)
    found = predict(ModelFiles(given.model), moments, Bundle(given.gradients), *options)
    write_parquet(snakemake.output[0], table_of({name: losses.tolist() for name, losses in found}), job.provenance)
