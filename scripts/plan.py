"""Rule `plan`: what a run would do and need; fails, with the number, if it does not fit. Nothing is computed."""

import math
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from winnow.calibration.few_tokens import planned
from winnow.errors import InputError
from winnow.jobs.start import start_job
from winnow.planning.config import load
from winnow.planning.forecast import forecast, machine, misfit
from winnow.planning.load import GB
from winnow.planning.plan import Plan
from winnow.planning.preview import cells_table, disk_lines, duration, jobs_of, print_tables, rates_line, size, works_table
from winnow.planning.rates import of_this_machine, rates_of
from winnow.planning.runtimes import known_shapes

if __name__ == "__main__":
    job = start_job(snakemake)
    spec = job.spec
    plan = Plan(load(spec["config"]), Path(spec["root"]), resources=spec["resources"])
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as stream:
        yaml.safe_dump(spec["config"], stream)
        stream.flush()
        command = [sys.executable, "-m", "snakemake", "all", "--dry-run", "--quiet", "rules", "host", "reason"]
        command += ["--snakefile", f"{spec['root']}/Snakefile", "--replace-workflow-config", "--configfile", stream.name]
        dry = subprocess.run(command, capture_output=True, text=True)
    if dry.returncode:
        reason = (dry.stderr.strip() or dry.stdout.strip()).splitlines()[-1]
        raise InputError(f"the dry run failed: {reason.removeprefix('winnow: ')}")
    to_run = jobs_of(dry.stdout + dry.stderr)
    names = dict.fromkeys(cell.model for cell in plan.cells)
    shapes = known_shapes(plan, names)
    absent = [name for name in names if name not in shapes]
    works, name = forecast(plan, shapes), spec["device"]
    here, device = of_this_machine(), None if name is None else rates_of(name)
    table, seconds = works_table(works, plan, to_run, Path("results"), here, device)
    print_tables([cells_table(plan, shapes), table])
    found = {**machine(), "device": device.memory or math.inf if device else 0.0}
    limits = {key: float(given) * GB if given else found[key] for key, given in spec["limits"].items()}
    print(f"{len(plan.cells)} cells, {sum(to_run.values())} jobs to run, about {duration(seconds)} one after another")
    print(rates_line(here, device, name if isinstance(name, str) else "device"))
    own = f" and {size(limits['device'])} of the device" if 0 < limits["device"] < math.inf else ""
    print(f"memory for a job: {size(limits['memory'])}{own}; free disk: {size(limits['disk'])}")
    for line in [*disk_lines(works, shapes), *planned(plan, shapes)]:
        print(line)
    if absent:
        print(f"not forecast, since not downloaded yet (`snakemake prefetch`): {', '.join(absent)}")
    if misfits := misfit(works, to_run, **limits):
        raise InputError(misfits)
