"""Rule `allocate`: one size per group of matrices, and the bytes that it costs."""

from winnow.allocation import allocate, chosen_groups, experts_left_dense, summarize
from winnow.io import read_parquet, write_json
from winnow.models import ModelFiles
from winnow.runtime import start_job
from winnow.structures import structure_of

if __name__ == "__main__":
    job = start_job(snakemake)
    budget = job.spec["budget"]
    spectra = read_parquet(snakemake.input.spectra).set_index("group")
    chosen = (ModelFiles(snakemake.input.model), structure_of(job.spec["structure"]), budget["targets"], spectra)
    groups = chosen_groups(*chosen)
    sizes = allocate(groups, budget)
    result = {"budget": budget, **summarize(groups, sizes), "left_dense": experts_left_dense(*chosen)}
    write_json(snakemake.output[0], result, job.provenance)
