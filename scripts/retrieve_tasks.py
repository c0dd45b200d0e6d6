"""Rule `retrieve_tasks`: checked tasks of lm-eval, with the digests of their documents; needs the network for hub data."""

from winnow.data.tasks import documents_of, load_tasks
from winnow.io.artifacts import write_json
from winnow.jobs.start import start_job

if __name__ == "__main__":
    job = start_job(snakemake)
    tasks = load_tasks(job.spec)
    facts = {name: documents_of(task, job.spec["limit"]) for name, task in tasks.items()}
    write_json(snakemake.output[0], {"tasks": facts}, job.provenance)
