"""What keeping the cache true costs: seconds to plan a sweep, and to find that nothing is to be done, by number of jobs.

    python tests/benchmarks/planning.py [cells ...]

Nothing is computed: the outputs of a sweep are made as empty files, and Snakemake is told that they are finished.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
METHODS = 10
TOUCH = "from snakemake.executors import touch; touch.Executor.SLEEPING_TIME = 0; from snakemake.cli import main; main()"


def sweep(cells: int) -> dict:
    """A configuration of so many compressed cells of the demo model: ten methods at many budgets."""
    demo = ROOT / "resources"
    alphas = [round(0.1 * (i + 1), 1) for i in range(METHODS)]
    keeps = [round(0.3 + 0.6 * i / max(1, cells // METHODS), 5) for i in range(cells // METHODS)]
    names = {"methods": [f"alpha-{a}" for a in alphas], "budgets": [f"keep-{k}" for k in keeps]}
    return {
        "models": {"demo": {"source": str(demo / "models" / "demo")}},
        "texts": {p: {"files": [str(demo / f"texts/demo/{p}.jsonl")], "format": "jsonl"} for p in ("calibration", "evaluation")},
        "calibrations": {"c": {"text": "calibration", "windows": 16, "length": 64}},
        "methods": {
            f"alpha-{a}": {"structure": {"kind": "low_rank"}, "metric": {"kind": "mean_abs", "alpha": a}} for a in alphas
        },
        "budgets": {f"keep-{k}": {"keep_bytes": k} for k in keeps},
        "evaluations": {"e": {"text": "evaluation", "length": 64, "windows": 16}},
        "experiments": {"sweep": {"models": ["demo"], "calibrations": ["c"], "evaluations": ["e"], **names}},
    }


def snakemake(folder: Path, *arguments: str, cores: int = 2, program: tuple[str, str] = ("-m", "snakemake")) -> tuple[float, str]:
    """(seconds, what it printed)"""
    command = [sys.executable, *program, *arguments, "--snakefile", str(ROOT / "Snakefile"), "--cores", str(cores)]
    command += ["--replace-workflow-config", "--configfile", str(folder / "config.yaml"), "--directory", str(folder)]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return time.perf_counter() - began, done.stdout + done.stderr


def fingerprints() -> float:
    """Seconds for the digests of the code of every stage, as a run reads them again."""
    from winnow.planning.fingerprints import CodeTracker

    with tempfile.TemporaryDirectory() as memory:
        for _ in range(2):
            began = time.perf_counter()
            tracker = CodeTracker(ROOT, Path(memory))
            for script in (ROOT / "scripts").glob("*.py"):
                tracker.fingerprint(script.name)
            took = time.perf_counter() - began
    return took


def main(sizes: list[int]) -> None:
    print(f"fingerprints of all stages: {1000 * fingerprints():.0f} ms")
    print("| cells | jobs | plan, s | nothing to do, s |\n|---:|---:|---:|---:|")
    for cells in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "config.yaml").write_text(yaml.safe_dump(sweep(cells)))
            snakemake(folder, "-n")  # what the first run of all reads from disk is not what is asked for
            planned, text = snakemake(folder, "-n", "--quiet", "rules", "host", "reason")
            jobs = int(re.findall(r"^total +(\d+)$", text, flags=re.MULTILINE)[0])
            _, summary = snakemake(folder, "--summary")
            for line in summary.splitlines():
                if line.startswith("results/"):
                    path = folder / line.split("\t")[0]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.touch()
            # So many at a time, and without the tenth of a second that every job else sleeps.
            snakemake(folder, "--touch", "--forceall", cores=500, program=("-c", TOUCH))
            idle, text = snakemake(folder, "-n")
            assert "Nothing to be done" in text, text[-2000:]
            print(f"| {cells:,} | {jobs:,} | {planned:.1f} | {idle:.1f} |", flush=True)


if __name__ == "__main__":
    main([int(n) for n in sys.argv[1:]] or [33, 480, 1000, 2480])  # about 100, 1,000, 2,000 and 5,000 jobs
