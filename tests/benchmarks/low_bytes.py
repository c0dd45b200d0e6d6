"""Parts of config/studies/low_bytes.yaml on the trained models beside the checkout and the demo, for docs/low_bytes.py: the whole
study takes many hours.

    python -m tests.benchmarks.low_bytes FOLDER --part refined [--models wt2-llama demo] [--methods winnow] [--seeds 0 1 2]
        [--windows 64]

Jobs of earlier parts in the same folder are not run again. Then `python docs/low_bytes.py FOLDER/results` adds the rows.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import yaml

from tests.conftest import ROOT
from tests.shared.test_low_bytes import IN_32_BITS, WT2, study
from winnow.planning.config_files import default

FEWER = {"wt2-gpt2", "wt2-neox"}  # models whose rounded forms are evaluated on 64 windows
ROUNDED = {"rounded_nearest", "rounded_gram", "rounded_two_sided", "winnow"}
SECTIONS = ("models", "texts", "calibrations", "evaluations")


def configuration(part: str, models: list[str], methods: list[str] | None, seeds: list[int], windows: int | None) -> dict:
    """The configuration of one part of the study, of some models."""
    config, own, demo = study("low_bytes", WT2 | IN_32_BITS), default(), "demo"
    experiments = {name: given for name, given in config.pop("experiments").items() if f"-{part}" in name}
    given = yaml.safe_load((ROOT / "config/studies/low_bytes.yaml").read_text())
    experiments[demo] = given["experiments"].get(part) or given["experiments"][demo]
    for section in SECTIONS:
        config[section] |= {name: preset for name, preset in own[section].items() if name.startswith(demo)}
    config["models"][demo] = {"source": str(ROOT / own["models"][demo]["source"])}
    for text in config["texts"].values():
        text["files"] = [str(ROOT / file) for file in text["files"]]
    config["calibrations"] = {name: {**preset, "seeds": seeds} for name, preset in config["calibrations"].items()}
    config["calibrations"]["demo-3"] = {**given["calibrations"]["demo-3"], "text": "demo_calibration", "seeds": seeds}
    for preset in config["evaluations"].values():
        preset["windows"] = windows or preset["windows"]
    config["evaluations"]["wt2-64"] = {**config["evaluations"]["wt2"], "windows": min(64, windows or 64)}
    config["experiments"] = {}
    for place, experiment in experiments.items():
        for model in set(experiment["models"]) & set(models):
            chosen = methods or experiment["methods"]
            fewer = model in FEWER and set(chosen) <= ROUNDED
            here = {"models": [model], "methods": chosen, **({"evaluations": ["wt2-64"]} if fewer else {})}
            config["experiments"][f"{place}-{model}"] = {**experiment, **here}
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--part", required=True, help="an experiment of the study: demo (rounded forms), factored, refined, ...")
    parser.add_argument("--models", nargs="+", default=sorted(WT2 | IN_32_BITS | {"demo"}))
    parser.add_argument("--methods", nargs="+", help="instead of the experiment's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--windows", type=int, help="of the measurement, instead of 128 or 64")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    file = given.folder / f"{given.part}.yaml"
    file.write_text(yaml.safe_dump(configuration(given.part, given.models, given.methods, given.seeds, given.windows)))
    command = [sys.executable, "-m", "snakemake", "tables", "--snakefile", str(ROOT / "Snakefile"), "--cores", "2"]
    command += ["--directory", str(given.folder), "--replace-workflow-config", "--configfile", str(file)]
    command += ["--set-threads", "recover=1", "--quiet", "rules", "host", "reason"]  # two cells at a time
    sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()
