"""Rule `conclude_study`: tables, figures, a verdict per claim, and a page of all, from the cells and measurements of a study."""

from pathlib import Path

from winnow.claims import judge, read_claims_of
from winnow.classification_table import classification_table
from winnow.figures import save
from winnow.io import read_json, write_manifest, write_text
from winnow.report import render_study
from winnow.runtime import start_job
from winnow.studies import study_of
from winnow.studies.base import Evidence
from winnow.tables import summary

if __name__ == "__main__":
    job = start_job(snakemake)
    study, rows, scored = study_of(snakemake.wildcards.study), job.spec["rows"], job.spec["scores"]
    results = {row["result"]: read_json(row["result"]) for row in (*rows, *scored)}
    table = summary(rows, results).assign(result=[row["result"] for row in rows])
    measured = {model: read_json(path) for model, path in job.spec["measured"].items()}
    evidence = Evidence(table, results, measured, classification_table(scored, results) if scored else None, scored)
    conclusion = study.conclude(evidence)
    verdicts = judge(read_claims_of(job.spec["claims"]), conclusion.answers)
    folder = Path(snakemake.output[0]).parent
    for name, frame in {**conclusion.tables, "identities": conclusion.identities, "claims": verdicts}.items():
        write_text(folder / f"{name}.csv", frame.to_csv(index=False))
    for name, figure in conclusion.figures.items():
        save(figure, [str(folder / f"{name}.{kind}") for kind in ("svg", "png")], job.provenance)
    write_text(folder / "index.html", render_study(study, conclusion, verdicts, evidence, folder))
    write_manifest(folder, {"study": snakemake.wildcards.study}, job.provenance)
