# needs: lm-eval's tasks or the user's      makes: facts of the tasks, which evaluations of accuracy read
# steps: retrieve_tasks (may need the network: `snakemake prefetch`)


rule retrieve_tasks:
    """Load the tasks of a preset once, with their documents; whatever is wrong with them stops here."""
    input:
        files=task_files,
    output:
        "results/tasks/{evaluation}.json",
    log:
        "results/logs/retrieve_tasks/{evaluation}.log",
    benchmark:
        "results/benchmarks/retrieve_tasks/{evaluation}.tsv"
    wildcard_constraints:
        evaluation=PLAN.pattern("evaluations", kind="accuracy"),
    threads: 1
    resources:
        mem_mb=memory("retrieve_tasks", 4000),
        runtime=minutes(60),
    params:
        **stage("retrieve_tasks"),
    script:
        "../../scripts/retrieve_tasks.py"
