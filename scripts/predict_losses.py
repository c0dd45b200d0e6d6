"""Rule `predict_losses`: one row per group of matrices, with the predicted loss of every size."""

import logging
from typing import TYPE_CHECKING

from winnow.factors.members import factors_of
from winnow.factors.predict import predict, predicted_table
from winnow.factors.refit import fits_of
from winnow.io.artifacts import Bundle, write_parquet
from winnow.jobs.start import start_job
from winnow.models.files import ModelFiles
from winnow.structures.base import STRUCTURES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from winnow.calibration.reader import Layers
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.PredictLosses" = job.spec
    given, files = snakemake.input, ModelFiles(snakemake.input.model)
    structure = STRUCTURES.build(spec["structure"])
    fits: "Mapping[str, Layers]" = factors_of(structure, given.factors)[0]
    if spec["fits_again"]:
        fits = fits_of(files, structure, spec, given, job.device)[0]
    moments, options = Bundle(given.moments), (fits, structure, job.device)
    outer = Bundle(given.outer) if given.get("outer") else None
    for line in moments.manifest["few_tokens"]:
        logging.warning(line)
    found = predict(files, moments, Bundle(given.gradients), *options, outer)
    write_parquet(snakemake.output[0], predicted_table({name: losses.tolist() for name, losses in found}), job.provenance)
