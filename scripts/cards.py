"""Rule `cards`: the README of every checkpoint with its measured results."""

from pathlib import Path
from typing import TYPE_CHECKING

from winnow.checkpoint.card import card
from winnow.checkpoint.measured import Measured, text_of
from winnow.checkpoint.share import read_recipe
from winnow.io.artifacts import Bundle, read_json, write_json, write_text
from winnow.jobs.start import start_job

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.Cards" = job.spec
    for path, of in spec["cards"].items():
        bundle = Bundle(of["checkpoint"])
        measured = []
        for name, made in of["evaluations"].items():
            result = read_json(made["compressed"])
            measured.append(Measured(name, result, read_json(made["dense"]), *text_of(result, [Path()])))
        write_text(path, card(read_recipe(bundle.path("recipe.yaml").parent), measured))
    write_json(snakemake.output[0], {path: of["checkpoint"] for path, of in spec["cards"].items()}, job.provenance)
