# Which files of tasks jobs read: rows to learn and to score (functions of wildcards). Defines no rules.


def example_files(wildcards):
    task = PLAN.tasks()[wildcards.task]
    return of_user([*task.train, *task.test])


def rows_of_task(part, task=None):
    """The rows `part` (train.parquet, test.parquet, or task.json, their facts) of the task that an evaluation scores, or of the
    one that `task` names for the wildcards."""

    def path(wildcards):
        name = (
            task(wildcards) if task else PLAN.names["evaluations"][wildcards.evaluation]
        )
        return f"results/examples/{PLAN.task_label(name)}/{part}"

    return path


def task_of_calibration(wildcards):
    return PLAN.preset("calibrations", wildcards.windows).task


def task_of_model(wildcards):
    return PLAN.preset("models", wildcards.model).finetune.task


def rows_of_recovery(part):
    """The rows that a recovery learns, if it learns those of a task."""

    def path(wildcards):
        name = getattr(PLAN.preset("recoveries", wildcards.recovery), "task", None)
        return f"results/examples/{PLAN.task_label(name)}/{part}" if name else []

    return path


def task_files(wildcards):
    return of_user(PLAN.outside.task(wildcards.evaluation))


def rows_check(wildcards):
    """That a calibration text shares nothing with the test rows; train rows of a task were compared when they were read."""
    if PLAN.preset("calibrations", wildcards.calibration).task:
        return []
    calibration = PLAN.text_label("calibrations", wildcards.calibration)
    task = PLAN.task_label(PLAN.names["evaluations"][wildcards.evaluation])
    return f"results/texts/overlap/{calibration}/{task}.json"
