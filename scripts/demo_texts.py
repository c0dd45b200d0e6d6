"""Rule `demo_texts`: documents of this Python installation, one JSON row each, in three parts."""

import json
from pathlib import Path

from winnow.demo import collect_documents, split_documents
from winnow.io import write_text
from winnow.runtime import start_job

if __name__ == "__main__":
    start_job(snakemake)
    parts = split_documents(collect_documents())
    for path in snakemake.output:
        rows = parts[Path(path).stem]
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
