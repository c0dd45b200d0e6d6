"""Rule `collect_outer`: a file of `{role}.{statistic}` tensors of the embeddings and the head per layer that they belong to."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from winnow.calibration.outer import collect_outer
from winnow.calibration.stored import stored
from winnow.checkpoint.loading import load_model
from winnow.io.artifacts import read_tensors, write_manifest, write_tensors
from winnow.jobs.start import start_job
from winnow.models.architectures import moments_file
from winnow.models.files import ModelFiles

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.CollectGradients" = job.spec
    files, folder = ModelFiles(snakemake.input.model), Path(snakemake.output[0]).parent
    windows = read_tensors(snakemake.input.tokens, sealed=True)[0]["ids"]
    batch = max(1, snakemake.resources.batch_tokens // windows.shape[1])
    labels = (spec["gradient_labels"], spec["seed"], spec["first_token"])
    model = load_model(files.verify(), spec["dtype"], job.device)
    for layer, roles in collect_outer(model, files.outer, windows, batch, getattr(torch, spec["precision"]), *labels):
        write_tensors(folder / moments_file(layer), stored(roles), job.provenance)
    write_manifest(folder, {"tokens": windows.numel()}, job.provenance)
