"""Rule `retrieve_base`: where the model that is tuned lies, and the digests of its files."""

from winnow.io import file_digest, write_json
from winnow.models import model_files
from winnow.retrieve import fetch
from winnow.runtime import start_job

if __name__ == "__main__":
    job = start_job(snakemake)
    directory = fetch(job.spec["source"], job.spec["revision"])
    files = {path.name: file_digest(path) for path in model_files(directory)}
    write_json(snakemake.output[0], {"directory": str(directory), "files": files}, job.provenance)
