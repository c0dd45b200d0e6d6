"""Rule `demo_texts`: documents of this Python installation, one JSON row each, in three parts."""

import json
from pathlib import Path

from winnow.io.artifacts import write_text
from winnow.jobs.start import start_job
from winnow.training.demo import collect_documents, split_documents

if __name__ == "__main__":
    start_job(snakemake)
    parts = split_documents(collect_documents())
    for path in snakemake.output:
        rows = parts[Path(path).stem]
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
