"""Rule `tokenize_rows`: train rows of a task tokenized for a classifier, one window each (windows, longest) int32, padded."""

from typing import TYPE_CHECKING

import torch

from winnow.data.examples import encode_rows, takes_types
from winnow.data.tokens import PAD, check_length, load_tokenizer
from winnow.io.artifacts import read_parquet, write_tensors
from winnow.jobs.start import start_job
from winnow.models.classes import read_config
from winnow.models.files import ModelFiles

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.Windows" = job.spec
    files = ModelFiles(snakemake.input.model)
    check_length(spec["length"], files.manifest["max_length"])
    directory = files.verify()
    examples = encode_rows(load_tokenizer(directory), read_parquet(snakemake.input.rows), spec["length"])
    ids, types = map(torch.from_numpy, examples.windows(spec["windows"], spec["seed"], PAD))
    tensors = {"ids": ids, **({"types": types} if takes_types(read_config(directory)) else {})}
    facts = {"rows": len(examples.ids), "tokens": int((ids != PAD).sum())}
    write_tensors(snakemake.output[0], tensors, {**facts, "provenance": job.provenance}, sealed=True)
