"""Rule `measure_spectra`: one row per group of matrices, from the spectrum in its factors."""

import pandas as pd

from winnow.factors.spectra import spectrum_row
from winnow.io.artifacts import Bundle, write_parquet
from winnow.jobs.start import start_job

if __name__ == "__main__":
    job = start_job(snakemake)
    rows = []
    for manifest in snakemake.input:
        bundle = Bundle(manifest)
        for name in bundle.manifest["groups"]:
            fit = bundle.tensors(f"{name}.safetensors", ("spectrum", "error", "numbers"))
            spectrum, error, numbers = (fit[key].numpy() for key in ("spectrum", "error", "numbers"))
            rows.append(spectrum_row(name, spectrum, error, numbers, job.spec["metric"]))
    rows.sort(key=lambda row: row["group"])
    write_parquet(snakemake.output[0], pd.DataFrame(rows), job.provenance)
