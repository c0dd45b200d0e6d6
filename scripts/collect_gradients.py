"""Rule `collect_gradients`: a file of `{role}.{statistic}` tensors of gradients of the loss per layer."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from winnow.calibration.gradients import collect_gradients
from winnow.checkpoint.loading import load_model
from winnow.io.artifacts import read_tensors, write_manifest, write_tensors
from winnow.io.resume import Resume
from winnow.jobs.start import start_job
from winnow.models.architectures import moments_file
from winnow.models.files import ModelFiles

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.CollectGradients" = job.spec
    files = ModelFiles(snakemake.input.model)
    model = load_model(files.verify(), spec["dtype"], job.device)
    windows = read_tensors(snakemake.input.tokens, sealed=True)[0]["ids"]
    batch = max(1, snakemake.resources.batch_tokens // windows.shape[1])
    precision, folder = getattr(torch, spec["precision"]), Path(snakemake.output[0]).parent
    resume = Resume(snakemake.output[0], job.provenance)
    options = (batch, precision, spec["gradient_labels"], spec["seed"], spec["first_token"], resume)
    for layer, roles in collect_gradients(model, files.matrices, windows, *options):
        tensors = {f"{role}.{name}": value for role, values in roles.items() for name, value in values.items()}
        write_tensors(folder / moments_file(layer), tensors, job.provenance)
    write_manifest(folder, {"tokens": windows.numel()}, job.provenance)
    resume.clear()
