"""Rule `predict_losses`: one row per group of matrices, with the predicted loss of every size."""

import logging
from typing import TYPE_CHECKING

from winnow.factors.predict import predict, predicted_table
from winnow.io.artifacts import Bundle, write_parquet
from winnow.jobs.start import start_job
from winnow.models.files import ModelFiles
from winnow.structures.base import STRUCTURES

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.Structure" = job.spec
    given = snakemake.input
    factors = {name: bundle for bundle in map(Bundle, given.factors) for name in bundle.manifest["groups"]}
    moments, options = Bundle(given.moments), (factors, STRUCTURES.build(spec["structure"]), job.device)
    outer = Bundle(given.outer) if given.get("outer") else None
    for line in moments.manifest["few_tokens"]:
        logging.warning(line)
    found = predict(ModelFiles(given.model), moments, Bundle(given.gradients), *options, outer)
    write_parquet(snakemake.output[0], predicted_table({name: losses.tolist() for name, losses in found}), job.provenance)
