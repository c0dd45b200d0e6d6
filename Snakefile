from snakemake.utils import min_version

min_version("9.20")


# By its place: in whatever folder a run works, the default is there, and other files add to it.
configfile: workflow.current_basedir.join("config/config.yaml").get_path_or_uri(secret_free=True)


include: "workflow/rules/speed.smk"
include: "workflow/rules/common.smk"
include: "workflow/rules/records.smk"
include: "workflow/rules/warm.smk"
include: "workflow/rules/patches.smk"
include: "workflow/rules/resources.smk"
include: "workflow/rules/inputs.smk"
include: "workflow/rules/factor_inputs.smk"
include: "workflow/rules/task_inputs.smk"
include: "workflow/rules/evaluation_inputs.smk"
include: "workflow/rules/cells.smk"
include: "workflow/rules/retrieve.smk"
include: "workflow/rules/finetune.smk"
include: "workflow/rules/statistics.smk"
include: "workflow/rules/parts.smk"
include: "workflow/rules/factors.smk"
include: "workflow/rules/compress.smk"
include: "workflow/rules/refit.smk"
include: "workflow/rules/recover.smk"
include: "workflow/rules/tasks.smk"
include: "workflow/rules/rows.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/tabulate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/studies.smk"
include: "workflow/rules/maintain.smk"
include: "workflow/rules/demo.smk"


rule all:
    """Run the configured experiments: tables of what they measure, figures and the report."""
    default_target: True
    input:
        outcome(),


onstart:
    hold_folder()


onsuccess:
    print_stopped()
    print_report_path()


onerror:
    print_stopped()
