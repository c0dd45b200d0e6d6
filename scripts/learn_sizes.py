"""Rule `learn_sizes`: a size for every group of matrices, learned on what the whole model loses, and a record of the looks."""

from winnow.allocation import chosen_groups
from winnow.allocations import allocation_of
from winnow.io import read_tensors, write_json
from winnow.learning import learn
from winnow.members import factors_of, table_of
from winnow.models import ModelFiles
from winnow.runtime import start_job
from winnow.structures import structure_of

if __name__ == "__main__":
    job = start_job(snakemake)
    spec, given = job.spec, snakemake.input
    files, structure, budget = ModelFiles(given.model), structure_of(spec["structure"]), spec["budget"]
    factors, _ = factors_of(structure, given.factors)
    predicted = table_of(structure, given.predicted) if given.get("predicted") else None
    groups = chosen_groups(files, structure, budget["targets"], table_of(structure, given.spectra), predicted)
    windows = read_tensors(given.tokens, sealed=True)[0]["ids"]
    options = allocation_of(budget["allocation"]).options
    found = learn(files, factors, groups, budget, options, windows, spec["dtype"], job.device)
    write_json(snakemake.output[0], {"sizes": found.sizes, **found.record}, job.provenance)
