"""Rule `factorize`: one file per group of matrices, its leading directions first, with spectrum and error."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from winnow.calibration.reader import Latest
from winnow.factors.fit import fit_groups, labels_by_matrix, left_dense, storable
from winnow.factors.refit import without_tensors
from winnow.io.artifacts import Bundle, read_parquet, write_manifest, write_tensors
from winnow.io.resume import own_files
from winnow.jobs.start import start_job
from winnow.metrics.base import METRICS
from winnow.models.files import ModelFiles
from winnow.structures.base import STRUCTURES

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.Factorize" = job.spec
    method = spec["method"]
    structure, metric = STRUCTURES.build(method["structure"]), METRICS.build(method["metric"]) if method["metric"] else None
    given, files = snakemake.input, ModelFiles(snakemake.input.model)
    bundles = ("moments", "gradients", "outer")
    moments, gradients, outer = (Latest(Bundle(given[name])) if given.get(name) else None for name in bundles)
    labels = labels_by_matrix(read_parquet(given.clusters)) if given.get("clusters") else {}
    folder = Path(snakemake.output[0]).parent
    names = [name.removesuffix(".safetensors") for name in own_files(folder, job.provenance)]
    options = (labels, structure, metric, spec["shard"], job.device, names)
    for name, fit, numbers in fit_groups(files, outer or moments, gradients, *options):
        tensors = storable(structure, fit) | {"spectrum": fit.spectrum.cpu(), "error": fit.error.cpu()}
        tensors["numbers"] = torch.tensor(numbers)
        if spec["refitted"]:
            tensors = without_tensors(files, structure, metric, moments, gradients, outer, name, tensors, job.device)
        write_tensors(folder / f"{name}.safetensors", tensors, job.provenance)
        names.append(name)
    dense = left_dense(files, outer or moments, structure, metric, spec["shard"])
    write_manifest(folder, {"groups": sorted(names), "left_dense": dense}, job.provenance)
