"""Rule `collect_statistics`: a file of `{site}.{statistic}` tensors per layer, and a table with one row per channel; of a part of
the windows (`collect_statistics_part`) sums instead of statistics, and no table."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from winnow.calibration.channels import write_channels
from winnow.calibration.parts import part_of
from winnow.calibration.statistics import collect, collect_by_block
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
    spec: "specs.CollectStatistics" = job.spec
    moments, files = snakemake.output.moments, ModelFiles(snakemake.input.model)
    tokens, part = read_tensors(snakemake.input.tokens, sealed=True)[0], snakemake.wildcards.get("part")
    chosen = part_of(len(tokens["ids"]), part)
    windows, types = tokens["ids"][chosen], tokens["types"][chosen] if "types" in tokens else None
    batch = max(1, snakemake.resources.batch_tokens // windows.shape[1])
    options = (files.matrices, windows, batch, getattr(torch, spec["precision"]), spec["first_token"])
    resume, folder, layers = Resume(moments, job.provenance), Path(moments).parent, sorted({m.layer for m in files.matrices})
    if snakemake.resources.stream:
        kept = own_files(folder, job.provenance)
        streamed = Streamed(files.verify(), spec["dtype"], job.device, moments, windows.shape[1], job.provenance)
        streamed.trust([layer for layer in layers if moments_file(layer) in kept])
        found = collect_by_block(streamed, *options, types=types, sums=bool(part))
    else:
        model = load_model(files.verify(), spec["dtype"], job.device)
        found = collect(model, *options, resume, types, sums=bool(part))
    with closing(found):
        for layer, sites in found:
            write_tensors(folder / moments_file(layer), stored(sites), job.provenance)
            del sites  # frees memory before the next layer
    counts = {"tokens": int((windows >= 0).sum()), "windows": len(windows)}
    if part:
        write_manifest(folder, counts, job.provenance)
    else:
        write_channels(snakemake.output, files, [counts], job.provenance)
    resume.clear()
    clear_left(moments)
