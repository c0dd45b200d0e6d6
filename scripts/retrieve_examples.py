"""Rule `retrieve_examples`: the train and test rows of a classification task with numbered classes; may need the network."""

from winnow.data.rows import SPLITS, read_task
from winnow.io.artifacts import write_json, write_parquet
from winnow.jobs.start import start_job

if __name__ == "__main__":
    job = start_job(snakemake)
    tables, facts = read_task(job.spec)
    for split in SPLITS:
        write_parquet(snakemake.output[split], tables[split], job.provenance)
    write_json(snakemake.output.facts, facts, job.provenance)
