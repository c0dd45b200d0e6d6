"""Rule `retrieve_model`: the manifest of a model: digests of its files, and every tensor by its canonical name."""

from winnow.io import Bundle, write_json
from winnow.retrieve import describe, fetch
from winnow.runtime import start_job

if __name__ == "__main__":
    job = start_job(snakemake)
    if tuned := snakemake.input.get("tuned"):
        Bundle(tuned).verify()
    directory = fetch(job.spec["source"], job.spec["revision"])
    write_json(snakemake.output[0], describe(directory), job.provenance)
