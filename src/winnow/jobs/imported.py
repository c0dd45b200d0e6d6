"""Imported last by the process that jobs are forked from: makes what most jobs would make again, and keeps the sources of what
that process holds in memory."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from winnow.allocation.base import ALLOCATIONS
from winnow.evaluation.base import EVALUATIONS
from winnow.jobs.code import note_imports
from winnow.metrics.base import METRICS
from winnow.recovery.base import RECOVERIES
from winnow.structures.base import STRUCTURES

for registry in (ALLOCATIONS, EVALUATIONS, METRICS, RECOVERIES, STRUCTURES):
    len(registry)  # imports all kinds
assert STRUCTURES.union is not None  # completes the options of those that hold others
get_checkpoint_conversion_mapping("llama")  # the first call makes those of all models, for half a second
note_imports()
