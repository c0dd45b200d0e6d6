"""Rule `merge_statistics`: the statistics of `collect_statistics` from the sums of its parts, which are then removed."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from winnow.calibration.channels import write_channels
from winnow.calibration.merging import merged
from winnow.calibration.statistics import Moments
from winnow.calibration.stored import stored
from winnow.io.artifacts import Bundle, write_tensors
from winnow.io.progress import every
from winnow.jobs.start import start_job
from winnow.models.architectures import moments_file
from winnow.models.files import ModelFiles

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.CollectStatistics" = job.spec
    files, folder = ModelFiles(snakemake.input.model), Path(snakemake.output.moments).parent
    parts = [Bundle(path) for path in snakemake.input.parts]
    for layer in every(sorted({m.layer for m in files.matrices}), "layers"):
        sites = list(dict.fromkeys(m.site for m in files.matrices if m.layer == layer))
        found = merged([part.path(moments_file(layer)) for part in parts], Moments, spec["precision"], sites)
        write_tensors(folder / moments_file(layer), stored(dict(found)), job.provenance)
    write_channels(snakemake.output, files, [part.manifest for part in parts], job.provenance)
    for part in parts:
        shutil.rmtree(part.directory)
