"""Rule `predict_in_rounds`: predicted losses around the model compressed to a budget, and a record of every round."""

from typing import TYPE_CHECKING

import torch

from winnow.allocation.groups import chosen_groups
from winnow.allocation.rounds import Setting, predict_in_rounds
from winnow.allocation.times import with_times
from winnow.factors.members import member_table
from winnow.factors.predict import predicted_table
from winnow.factors.refit import fits_of
from winnow.io.artifacts import read_json, read_tensors, write_json, write_parquet
from winnow.jobs.start import start_job
from winnow.models.files import ModelFiles
from winnow.structures.base import STRUCTURES

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.PredictInRounds" = job.spec
    given = snakemake.input
    files, structure = ModelFiles(given.model), STRUCTURES.build(spec["structure"])
    factors, _ = fits_of(files, structure, spec, given, job.device)
    tables = (member_table(structure, paths) for paths in (given.spectra, given.predicted))
    groups = chosen_groups(files, structure, spec["budget"]["targets"], *tables)
    groups = with_times(groups, read_json(given.times)) if given.get("times") else groups
    windows = read_tensors(given.tokens, sealed=True)[0]["ids"]
    batch = max(1, snakemake.resources.batch_tokens // windows.shape[1])
    options = (getattr(torch, spec["precision"]), spec["first_token"], spec["gradient_labels"], spec["seed"])
    setting = Setting(windows, batch, spec["dtype"], job.device, *options)
    found, records = predict_in_rounds(files, factors, structure, groups, spec["budget"], spec["rounds"], setting)
    write_json(snakemake.output.rounds, {"rounds": records}, job.provenance)
    write_parquet(snakemake.output.predicted, predicted_table(found), job.provenance)
