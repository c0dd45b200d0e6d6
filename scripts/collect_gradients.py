"""Rule `collect_gradients`: a file of `{role}.{statistic}` tensors of gradients of the loss per layer; of a part of the windows
(`collect_gradients_part`) sums instead of statistics."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from winnow.calibration.gradients import collect_gradients
from winnow.calibration.gradients_by_block import collect_gradients_by_block
from winnow.calibration.parts import hidden_bound, part_of
from winnow.calibration.stored import stored
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.streaming import Streamed, clear_left
from winnow.io.artifacts import read_tensors, write_manifest, write_tensors
from winnow.io.resume import Resume, own_files
from winnow.jobs.start import start_job
from winnow.models.architectures import moments_file
from winnow.models.files import ModelFiles

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.CollectGradients" = job.spec
    files = ModelFiles(snakemake.input.model)
    ids, part = read_tensors(snakemake.input.tokens, sealed=True)[0]["ids"], snakemake.wildcards.get("part")
    chosen = part_of(len(ids), part)
    windows = ids[chosen]
    batch = max(1, snakemake.resources.batch_tokens // windows.shape[1])
    manifest, folder = snakemake.output[0], Path(snakemake.output[0]).parent
    labels = (spec["gradient_labels"], spec["seed"], spec["first_token"])
    options = (files.matrices, windows, batch, getattr(torch, spec["precision"]), *labels)
    resume = Resume(manifest, job.provenance)
    if snakemake.resources.stream:
        kept = own_files(folder, job.provenance)
        done = [layer for layer in {m.layer for m in files.matrices} if moments_file(layer) in kept]
        streamed = Streamed(files.verify(), spec["dtype"], job.device, manifest, windows.shape[1])
        bound = hidden_bound(snakemake.resources.hidden_mb, files.manifest["bytes"])
        found = collect_gradients_by_block(streamed, *options, job.provenance, done, chosen.start, bool(part), bound)
    else:
        model = load_model(files.verify(), spec["dtype"], job.device)
        found = collect_gradients(model, *options, resume, chosen.start, bool(part))
    for layer, roles in found:
        write_tensors(folder / moments_file(layer), stored(roles), job.provenance)
        del roles  # frees memory before the next layer
    write_manifest(folder, {"tokens": windows.numel()}, job.provenance)
    resume.clear()
    clear_left(manifest)
