"""Rule `merge_gradients`: the statistics of `collect_gradients` from the sums of its parts, which are then removed."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from winnow.calibration.gradients import OutputMoments
from winnow.calibration.merging import merged
from winnow.calibration.stored import stored
from winnow.io.artifacts import Bundle, write_manifest, write_tensors
from winnow.io.progress import every
from winnow.jobs.start import start_job
from winnow.models.architectures import moments_file
from winnow.models.files import ModelFiles

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.CollectGradients" = job.spec
    matrices, folder = ModelFiles(snakemake.input.model).matrices, Path(snakemake.output[0]).parent
    parts = [Bundle(path) for path in snakemake.input.parts]
    for layer in every(sorted({m.layer for m in matrices}), "layers"):
        roles = [m.role for m in matrices if m.layer == layer and m.expert is None]
        found = merged([part.path(moments_file(layer)) for part in parts], OutputMoments, spec["precision"], roles)
        write_tensors(folder / moments_file(layer), stored(dict(found)), job.provenance)
    write_manifest(folder, {"tokens": sum(part.manifest["tokens"] for part in parts)}, job.provenance)
    for part in parts:
        shutil.rmtree(part.directory)
