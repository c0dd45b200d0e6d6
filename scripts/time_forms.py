"""Rule `time_forms`: how long products with the forms of a model's matrices take, beside the dense ones."""

from typing import TYPE_CHECKING

from winnow.allocation.time_forms import time_forms
from winnow.allocation.times import Timing
from winnow.io.artifacts import write_json
from winnow.jobs.start import start_job
from winnow.models.files import ModelFiles
from winnow.structures.base import STRUCTURES

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.TimeForms" = job.spec
    structure, timing = STRUCTURES.build(spec["structure"]), Timing(keep=1, **spec["timing"])
    found = time_forms(ModelFiles(snakemake.input.model).matrices, structure, timing, spec["dtype"], job.device)
    write_json(snakemake.output[0], found, job.provenance)
