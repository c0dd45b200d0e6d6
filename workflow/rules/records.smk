# Snakemake's records of finished jobs, held against what results say of themselves. Defines no rules; patches.smk puts it in.

import os


def params_of(job):
    """What results of a job hold of its params."""
    return {
        name: job.params.get(name) for name in ("spec", "code", "versions", "files")
    }


def refuse_unrecorded(has_metadata):
    """Stop at results that Snakemake has no record of, and so calls up to date, if they were made with other params than
    today's: results also record what they were made from. That happens where .snakemake was removed or results were copied.
    """

    def checked(record, job):
        known = has_metadata(record, job)
        if known:
            return known
        outputs = [str(path) for path in job.output if os.path.exists(path)]
        if not outputs or record._filter_incomplete_keys(outputs):
            return known
        from winnow.planning.explain import difference  # rarely needed

        today = params_of(job)
        if today["code"] and (change := difference(outputs, today)):
            stop_with(
                f"{outputs[0]}: {change}, and Snakemake's own record of it is gone; delete it, or make everything anew with "
                "--forceall"
            )
        return known

    return checked


def keep_finished(incomplete):
    """Of the outputs that Snakemake calls incomplete, those that are: a job whose run was interrupted ends and writes its results,
    but nobody records it. If all of them are sealed, were made with today's params and from the inputs that are there, it is
    recorded now.
    """

    async def checked(record, job):
        marked = await incomplete(record, job)
        if not marked or not job.params.get("code"):
            return marked
        from winnow.planning.explain import finished  # rarely needed

        if not finished([str(path) for path in job.output], params_of(job)):
            return marked
        if not job.dag.workflow.dryrun:
            await record.finished(job)
        return []

    return checked
