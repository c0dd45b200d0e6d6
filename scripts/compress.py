"""Rule `compress`: a Hugging Face directory with the factors cut to the allocated sizes."""

from pathlib import Path

from winnow.checkpoint import compress, recipe_of, write_checkpoint
from winnow.io import Bundle, atomic, read_json
from winnow.models import ModelFiles
from winnow.runtime import start_job
from winnow.structures import structure_of

if __name__ == "__main__":
    job = start_job(snakemake)
    spec = job.spec
    files = ModelFiles(snakemake.input.model)
    structure = structure_of(spec["presets"]["method"]["structure"])
    bundles = [Bundle(path) for path in snakemake.input.factors]
    factors = {name: bundle for bundle in bundles for name in bundle.manifest["groups"]}
    allocation = read_json(snakemake.input.allocation)
    tokens = {name: count for bundle in bundles for name, count in bundle.manifest["left_dense"].items()}
    allocation["left_dense"] = {name: tokens[name] for name in allocation["left_dense"]}
    sizes = {row["group"]: row["size"] for row in allocation["groups"]}
    stored, layouts, reports = compress(files, factors, structure, sizes)
    recipe = recipe_of(spec["names"], spec["presets"], allocation)
    with atomic(Path(snakemake.output[0]).parent) as folder:
        write_checkpoint(folder, files, stored, layouts, reports, spec["dtype"], recipe, job.provenance)
