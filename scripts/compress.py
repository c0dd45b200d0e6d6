"""Rule `compress`: a size for every group of matrices, and a Hugging Face directory with the truncated factors."""

from pathlib import Path
from typing import TYPE_CHECKING

from winnow.allocation.groups import allocate, chosen_groups, experts_left_dense, learned_choice, summarize
from winnow.allocation.times import with_times
from winnow.checkpoint.writer import compressed, recipe_of, write_checkpoint
from winnow.factors.members import member_table
from winnow.factors.refit import fits_of
from winnow.io.artifacts import atomic, read_json, write_json
from winnow.jobs.start import start_job
from winnow.models.files import ModelFiles
from winnow.structures.base import STRUCTURES

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.Compress" = job.spec
    presets = spec["presets"]
    files = ModelFiles(snakemake.input.model)
    structure = STRUCTURES.build(presets["method"]["structure"])
    given = snakemake.input
    chosen = (files, structure, presets["budget"]["targets"], member_table(structure, given.spectra))
    groups = chosen_groups(*chosen, member_table(structure, given.predicted) if given.get("predicted") else None)
    groups = with_times(groups, read_json(given.times)) if given.get("times") else groups
    choice = learned_choice(given.learned) if given.get("learned") else allocate(groups, presets["budget"])
    factors, tokens = fits_of(files, structure, presets["method"], given, job.device)
    record = summarize(groups, choice.sizes)
    record["left_dense"] = {name: tokens[name] for name in experts_left_dense(*chosen)}
    recipe = recipe_of(spec["names"], presets, record)
    with atomic(Path(snakemake.output.checkpoint).parent) as folder:
        parts = compressed(files, factors, structure, choice.sizes)
        write_checkpoint(folder, files, parts, spec["dtype"], recipe, job.provenance)
    write_json(snakemake.output.allocation, {"budget": presets["budget"], **choice.facts, **record}, job.provenance)
