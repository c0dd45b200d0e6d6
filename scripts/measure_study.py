"""Rule `measure_study`: the measurements of a study on a model's weights and statistics."""

from typing import TYPE_CHECKING

from winnow.io.artifacts import Bundle, read_tensors, write_json
from winnow.io.resume import Pieces
from winnow.jobs.start import start_job
from winnow.models.files import ModelFiles
from winnow.studies.base import Given, study_of

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.MeasureStudy" = job.spec
    study, pieces = study_of(spec["study"], spec.get("options")), Pieces(snakemake.output[0], job.provenance)
    given = snakemake.input
    windows, evaluation = (
        read_tensors(given[key], sealed=True)[0] if given.get(key) else {} for key in ("windows", "evaluation")
    )
    found = study.measure(
        Given(
            ModelFiles(given.model),
            spec["dtype"],
            job.device,
            Bundle(given.moments) if given.get("moments") else None,
            windows.get("ids"),
            (evaluation["ids"], evaluation["first"]) if evaluation else None,
            {(c["method"], c["budget"], c["recovery"]): Bundle(c["manifest"]) for c in spec.get("checkpoints", [])},
            pieces,
        )
    )
    write_json(snakemake.output[0], found, job.provenance)
    pieces.clear()
