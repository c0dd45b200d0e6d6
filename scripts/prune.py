"""Rule `prune`: list the results that no preset uses, with their bytes; remove them if requested."""

from pathlib import Path

from winnow.jobs.start import start_job
from winnow.planning.prune import remove, unreached

if __name__ == "__main__":
    job = start_job(snakemake)
    found = list(unreached(Path("results"), set(job.spec["labels"])))
    for path, size in found:
        print(f"{size:>16,} bytes  {path}")
        if job.spec["remove"]:
            remove(path)
    done = "removed" if job.spec["remove"] else "not reached by any preset; to remove them: snakemake prune --config prune=true"
    print(f"{sum(size for _, size in found):>16,} bytes  in {len(found)} files and folders {done}")
