from snakemake.utils import min_version

min_version("9.0")


configfile: "config/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/inputs.smk"
include: "workflow/rules/retrieve.smk"
include: "workflow/rules/statistics.smk"
include: "workflow/rules/factors.smk"
include: "workflow/rules/compress.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/maintain.smk"
include: "workflow/rules/demo.smk"


rule all:
    """Run the configured experiments: tables, figures, the report, and the checkpoints' cards."""
    default_target: True
    input:
        rules.exports.input,
        rules.cards.output,
        rules.tables.output,
        rules.figures.output,
        rules.report.output,


onstart:
    hold_folder()


onsuccess:
    print_report_path()
