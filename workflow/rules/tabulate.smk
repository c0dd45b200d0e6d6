# needs: a JSON file per cell      makes: a table for every kind of evaluation that has one of its own; cards with the losses
# steps: tabulate_<kind>; cards. A target of the name of every kind: what it measures of all cells, and its table


for kind, evaluation in EVALUATIONS.items():
    if evaluation.table:

        rule:
            name:
                f"tabulate_{kind}"
            input:
                results_of(kind),
            output:
                csv=f"results/tables/{kind}.csv",
                parquet=f"results/tables/{kind}.parquet",
            log:
                f"results/logs/tabulate_{kind}.log",
            benchmark:
                f"results/benchmarks/tabulate_{kind}.tsv"
            localrule: True
            threads: 1
            resources:
                mem_mb=2000,
                runtime=10,
            params:
                **stage(f"tabulate_{kind}"),
            script:
                "../../scripts/tabulate.py"

    rule:
        name:
            kind
        input:
            results_of(kind),
            table_of(kind),


rule cards:
    """The README of every checkpoint with its numbers, which are known only after the checkpoint is finished."""
    input:
        results=results_of("perplexity"),  # they change with the checkpoints that the cards describe
    output:
        "results/cards.json",  # the cards, {recovery}/README.md, are as many as cells: Snakemake would keep a record of each
    log:
        "results/logs/cards.log",
    benchmark:
        "results/benchmarks/cards.tsv"
    localrule: True
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        **stage("cards"),
    script:
        "../../scripts/cards.py"
