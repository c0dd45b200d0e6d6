"""Rule `dequantize`: the model of a GGUF file as a directory of safetensors with config and tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING

from winnow.io.artifacts import atomic, write_manifest
from winnow.jobs.start import start_job
from winnow.models.gguf import dequantize_model

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.Dequantize" = job.spec
    with atomic(Path(snakemake.output[0]).parent) as folder:
        folder.mkdir()
        write_manifest(folder, dequantize_model(snakemake.input[0], folder, spec["dtype"]), job.provenance)
