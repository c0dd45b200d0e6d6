"""Rule `cards`: the README of every checkpoint with its measured results."""

from winnow.checkpoint.card import Measured, card
from winnow.checkpoint.share import read_recipe
from winnow.io.artifacts import Bundle, read_json, write_json, write_text
from winnow.jobs.start import start_job

if __name__ == "__main__":
    job = start_job(snakemake)
    for path, of in job.spec["cards"].items():
        bundle = Bundle(of["checkpoint"])
        measured = [
            Measured(name, read_json(made["compressed"]), read_json(made["dense"])) for name, made in of["evaluations"].items()
        ]
        write_text(path, card(read_recipe(bundle.path("recipe.yaml").parent), measured))
    write_json(snakemake.output[0], {path: of["checkpoint"] for path, of in job.spec["cards"].items()}, job.provenance)
