"""Rule `predict_losses`: one row per group of matrices, the loss that each of its sizes is predicted to cost."""

from winnow.io import Bundle, write_parquet
from winnow.models import ModelFiles
from winnow.prediction import predict, table_of
from winnow.runtime import start_job
from winnow.structures import structure_of

if __name__ == "__main__":
    job = start_job(snakemake)
    given = snakemake.input
    factors = {name: bundle for bundle in map(Bundle, given.factors) for name in bundle.manifest["groups"]}
    options = (factors, structure_of(job.spec["structure"]), job.device)
    found = predict(ModelFiles(given.model), Bundle(given.moments), Bundle(given.gradients), *options)
    write_parquet(snakemake.output[0], table_of({name: losses.tolist() for name, losses in found}), job.provenance)
