"""Rule `collect_statistics`: per layer a file of `{site}.{statistic}` tensors, and a table with a row per channel."""

from pathlib import Path

import pandas as pd
import torch

from winnow.architectures import moments_file
from winnow.io import read_tensors, write_manifest, write_parquet, write_tensors
from winnow.loading import load_model
from winnow.models import ModelFiles
from winnow.resume import Resume
from winnow.runtime import start_job
from winnow.statistics import channel_rows, collect

if __name__ == "__main__":
    job = start_job(snakemake)
    files = ModelFiles(snakemake.input.model)
    model = load_model(files.verify(), job.spec["dtype"], job.device)
    tokens = read_tensors(snakemake.input.tokens, sealed=True)[0]
    windows, types = tokens["ids"], tokens.get("types")
    batch = max(1, snakemake.resources.batch_tokens // windows.shape[1])
    precision = getattr(torch, job.spec["precision"])
    folder, channels, resume = Path(snakemake.output.moments).parent, [], Resume(snakemake.output.moments, job.provenance)
    for layer, sites in collect(model, files.matrices, windows, batch, precision, job.spec["first_token"], resume, types):
        tensors = {f"{site}.{name}": value for site, values in sites.items() for name, value in values.items()}
        write_tensors(folder / moments_file(layer), tensors, job.provenance)
        readers = {s: [files.weight(m) for m in files.matrices if (m.layer, m.site) == (layer, s)] for s in sites}
        channels += [pd.DataFrame(channel_rows(layer, site, values, readers[site])) for site, values in sites.items()]
    write_parquet(snakemake.output.channels, pd.concat(channels, ignore_index=True), job.provenance)
    write_manifest(folder, {"tokens": int((windows >= 0).sum())}, job.provenance)
    resume.clear()
