"""Rule `retrieve_model`: the manifest of a model: digests of its files, and every tensor by its canonical name."""

from typing import TYPE_CHECKING

from winnow.io.artifacts import Bundle, write_json
from winnow.jobs.start import start_job
from winnow.models.retrieve import describe, fetch

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.Source" = job.spec
    for made in filter(None, (snakemake.input.get("tuned"), snakemake.input.get("dequantized"))):
        Bundle(made).verify()
    directory = fetch(spec["source"], spec["revision"])
    write_json(snakemake.output[0], describe(directory), job.provenance)
