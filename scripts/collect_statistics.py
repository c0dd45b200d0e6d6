"""Rule `collect_statistics`: a file of `{site}.{statistic}` tensors per layer, and a table with one row per channel."""

import logging
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from winnow.calibration.few_tokens import few_tokens
from winnow.calibration.statistics import CHANNELS, channel_rows, channel_table, collect, collect_by_block
from winnow.calibration.stored import stored
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.streaming import Streamed, clear_left
from winnow.io.artifacts import read_tensors, write_manifest, write_parquet, write_tensors
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
    tokens = read_tensors(snakemake.input.tokens, sealed=True)[0]
    windows, types = tokens["ids"], tokens.get("types")
    batch = max(1, snakemake.resources.batch_tokens // windows.shape[1])
    options = (files.matrices, windows, batch, getattr(torch, spec["precision"]), spec["first_token"])
    resume, folder, layers = Resume(moments, job.provenance), Path(moments).parent, sorted({m.layer for m in files.matrices})
    if snakemake.resources.stream:
        kept = own_files(folder, job.provenance)
        streamed = Streamed(files.verify(), spec["dtype"], job.device, moments, windows.shape[1], job.provenance)
        streamed.trust([layer for layer in layers if moments_file(layer) in kept])
        found = collect_by_block(streamed, *options, types=types)
    else:
        found = collect(load_model(files.verify(), spec["dtype"], job.device), *options, resume, types)
    with closing(found):
        for layer, sites in found:
            write_tensors(folder / moments_file(layer), stored(sites), job.provenance)
            del sites  # frees memory before the next layer
    channels, seen = [], []
    for layer in layers:
        for site in dict.fromkeys(m.site for m in files.matrices if m.layer == layer):
            names = {f"{site}.{key}": key for key in (*CHANNELS, "count")}
            values = {names[name]: v for name, v in read_tensors(folder / moments_file(layer), names=names)[0].items()}
            readers = (files.stored(m) for m in files.matrices if (m.layer, m.site) == (layer, site))
            seen.append((site, len(values["mean"]), int(values["count"])))
            channels.append(channel_rows(layer, site, values, readers))
    write_parquet(snakemake.output.channels, channel_table(channels), job.provenance)
    few = few_tokens(seen, len(windows))
    for line in few:
        logging.warning(line)
    write_manifest(folder, {"tokens": int((windows >= 0).sum()), "few_tokens": few}, job.provenance)
    resume.clear()
    clear_left(moments)
