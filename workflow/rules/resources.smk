# What a job asks of a cluster. Defines no rules, and no number depends on it.

from winnow.planning.needs import Needs

NEEDS = Needs(PLAN)


def memory(stage, otherwise):
    """Host memory in MB, as forecast for the job's model, else `otherwise`; twice as much at every retry."""

    def asked(wildcards, attempt):
        model = wildcards.get("model")
        if model is None:
            return otherwise * 2 ** (attempt - 1)
        return NEEDS.memory_mb(stage, model, attempt, otherwise)

    return asked


def minutes(first):
    """The time limit of a job; twice as much at every retry."""
    return lambda wildcards, attempt: first * 2 ** (attempt - 1)


def streamed(wildcards):
    """1 where a job reads the model block by block, 0 where it holds it as a whole; no number depends on it beyond rounding."""
    return int(PLAN.preset("models", wildcards.model).load == "stream")
