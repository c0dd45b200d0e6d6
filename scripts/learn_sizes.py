"""Rule `learn_sizes`: a size for every group of matrices, trained on the loss of the whole model, and a record of evaluations."""

from typing import TYPE_CHECKING

from winnow.allocation.base import ALLOCATIONS
from winnow.allocation.groups import chosen_groups
from winnow.allocation.learning import learn
from winnow.factors.members import member_table
from winnow.factors.refit import fits_of
from winnow.io.artifacts import read_tensors, write_json
from winnow.jobs.start import start_job
from winnow.models.files import ModelFiles
from winnow.structures.base import STRUCTURES

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.LearnSizes" = job.spec
    given = snakemake.input
    files, structure, budget = ModelFiles(given.model), STRUCTURES.build(spec["structure"]), spec["budget"]
    factors, _ = fits_of(files, structure, spec, given, job.device)
    predicted = member_table(structure, given.predicted) if given.get("predicted") else None
    groups = chosen_groups(files, structure, budget["targets"], member_table(structure, given.spectra), predicted)
    windows = read_tensors(given.tokens, sealed=True)[0]["ids"]
    options = ALLOCATIONS.build(budget["allocation"]).options
    found = learn(files, factors, groups, budget, options, windows, spec["dtype"], job.device)
    write_json(snakemake.output[0], {"sizes": found.sizes, **found.record}, job.provenance)
