# needs: a configuration, results      makes: nothing
# steps: plan (what a run would do and need), prune (what no preset reaches)


rule plan:
    """Print cells, jobs, bytes, memory, disk and time before any of it; fail if it cannot fit."""
    log:
        "results/logs/plan.log",
    localrule: True
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        spec={
            "config": CONFIG,
            "root": str(ROOT),
            "limits": LIMITS,
            "device": DEVICE,
            "resources": PLAN.resources,
        },
    script:
        "../../scripts/plan.py"


rule prune:
    """List results that no current preset reaches; `--config prune=true` removes them."""
    log:
        "results/logs/prune.log",
    localrule: True
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        spec={"labels": PLAN.all_labels(), "remove": PRUNE},
    script:
        "../../scripts/prune.py"
