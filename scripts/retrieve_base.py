"""Rule `retrieve_base`: the directory of the model to be fine-tuned, and the digests of its files."""

from typing import TYPE_CHECKING

from winnow.io.artifacts import Bundle, write_json
from winnow.jobs.start import start_job
from winnow.models.retrieve import fetch, model_digests

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.Source" = job.spec
    if made := snakemake.input.get("dequantized"):
        Bundle(made).verify()
    directory = fetch(spec["source"], spec["revision"])
    write_json(snakemake.output[0], {"directory": str(directory), "files": model_digests(directory)}, job.provenance)
