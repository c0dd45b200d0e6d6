"""Rule `conclude_study`: tables, figures, a verdict per claim, and a page, from the cells and measurements of a study."""

from pathlib import Path
from typing import TYPE_CHECKING

from winnow.evaluation.classification_table import classification_table
from winnow.io.artifacts import read_json, write_manifest, write_text
from winnow.jobs.start import start_job
from winnow.reporting.figures import save
from winnow.reporting.html import render_study
from winnow.reporting.tables import summary
from winnow.studies.base import Evidence, study_of
from winnow.studies.claims import judge, read_claims_of

if TYPE_CHECKING:
    from winnow.io import specs

if __name__ == "__main__":
    job = start_job(snakemake)
    spec: "specs.ConcludeStudy" = job.spec
    study, rows, scored = study_of(snakemake.wildcards.study), spec["rows"], spec["scores"]
    results = {row["result"]: read_json(row["result"]) for row in (*rows, *scored)}
    table = summary(rows, results).assign(result=[row["result"] for row in rows])
    measured = {model: read_json(path) for model, path in spec["measured"].items()}
    evidence = Evidence(table, results, measured, classification_table(scored, results) if scored else None, scored)
    conclusion = study.conclude(evidence)
    verdicts = judge(read_claims_of(spec["claims"]), conclusion.answers)
    folder = Path(snakemake.output[0]).parent
    for name, frame in {**conclusion.tables, "identities": conclusion.identities, "claims": verdicts}.items():
        write_text(folder / f"{name}.csv", frame.to_csv(index=False))
    for name, figure in conclusion.figures.items():
        save(figure, [str(folder / f"{name}.{kind}") for kind in ("svg", "png")], job.provenance)
    write_text(folder / "index.html", render_study(study, conclusion, verdicts, evidence, folder))
    write_manifest(folder, {"study": snakemake.wildcards.study}, job.provenance)
