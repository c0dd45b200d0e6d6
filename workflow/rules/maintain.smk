# needs: results      makes: nothing
# steps: prune (what no preset reaches)


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
