"""Rule `factorize`: one file per group of matrices, its leading directions first, with spectrum and error."""

from pathlib import Path

from winnow.factors import fit_groups
from winnow.io import Bundle, write_manifest, write_tensors
from winnow.metrics import metric_of
from winnow.models import ModelFiles
from winnow.runtime import start_job
from winnow.structures import structure_of

if __name__ == "__main__":
    job = start_job(snakemake)
    method = job.spec["method"]
    structure, metric = structure_of(method["structure"]), metric_of(method["metric"])
    moments = Bundle(snakemake.input.moments) if snakemake.input.get("moments") else None
    folder, names = Path(snakemake.output[0]).parent, []
    for name, fit in fit_groups(ModelFiles(snakemake.input.model), moments, structure, metric, job.spec["shard"], job.device):
        tensors = {key: value.float().cpu() for key, value in fit.tensors.items()}
        tensors |= {"spectrum": fit.spectrum.cpu(), "error": fit.error.cpu()}
        write_tensors(folder / f"{name}.safetensors", tensors, job.provenance)
        names.append(name)
    write_manifest(folder, {"groups": names}, job.provenance)
