"""Tasks of lm-eval, loaded from its own or the user's definitions, optionally on local data."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.data.task_files import is_file, is_group
from winnow.errors import InputError, first_line

if TYPE_CHECKING:
    from winnow.io import specs

log = logging.getLogger(__name__)
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}  # builders of `datasets` by file ending
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
FACTS = ("output_type", "dataset_path", "dataset_name", "num_fewshot", "doc_to_text", "doc_to_target", "doc_to_choice")


def stay_offline() -> None:
    """Disable all network access of libraries; hub data sets are read from the cache."""
    import datasets.config
    import huggingface_hub.constants

    os.environ["HF_HUB_OFFLINE"] = "1"  # for child processes; this process has read it when the libraries were imported
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True


def load_tasks(spec: specs.Tasks) -> dict[str, Any]:
    """{name: task}, with documents, of a resolved accuracy preset; groups are replaced by their tasks.

    Raises InputError, with the name of the task, if lm-eval does not know it, cannot read it, or has no data for it.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    manager = _manager(spec)
    found: dict[str, Any] = {}
    for entry in spec["tasks"]:
        task = {"group": "local", "task": [_on_files(manager, entry, spec["files"][entry])]} if entry in spec["files"] else entry
        try:
            loaded = manager.load([task])["tasks"]
        except (DatasetsError, LookupError, ValueError, TypeError, OSError, ImportError, AttributeError) as error:
            raise InputError(f"lm-eval cannot load the task {entry!r}: {type(error).__name__}: {_reason(error)}") from error
        for name, one in loaded.items():
            if name in found:
                raise InputError(f"duplicate task {name!r}, the second one from {entry!r}; remove one of them")
            found[name] = one
    return found


def _manager(spec: specs.Tasks) -> Any:
    """lm-eval's index of tasks. Reading all definitions takes seconds, so only the folders named like the tasks are read first;
    they suffice if every task is found there and none is a group, whose members may be anywhere."""
    import lm_eval.tasks

    names = [task for task in spec["tasks"] if not is_file(task)]
    own = [spec["include_path"]] if spec["include_path"] else []
    folders = [folder for name in names if (folder := Path(lm_eval.tasks.__file__).parent / name).is_dir()]
    if not any(is_group(Path(task)) for task in spec["tasks"] if is_file(task)):
        few = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[*folders, *own])
        if all(_is_task(few, name) for name in names):
            return few
    return lm_eval.tasks.TaskManager(include_path=own)


def _is_task(manager: Any, name: str) -> bool:
    entry = manager.task_index.get(name)
    return entry is not None and isinstance((entry.cfg or {}).get("task"), str)


def _reason(error: BaseException) -> str:
    """The first line of an error, or of its cause: `datasets` wraps the informative error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def _on_files(manager: Any, name: str, files: dict[str, list[str]]) -> dict[str, Any]:
    """The definition of a task, with its data set replaced by local files. Raises InputError if there is no such task."""
    if not _is_task(manager, name):
        raise InputError(f"`files`: lm-eval has no task {name!r}, or it is a group; list its tasks one by one")
    definition = manager.task_index[name].cfg
    used = {key: split for key in SPLITS if (split := definition.get(key))}
    unknown = sorted(set(files) - set(used.values()))
    if unknown:
        raise InputError(f"`files`: the task {name!r} has no split {unknown[0]!r}; its splits are {', '.join(used.values())}")
    if not {used.get("validation_split"), used.get("test_split")} & set(files):
        raise InputError(f"`files`: the task {name!r} is evaluated on {used.get('test_split') or used.get('validation_split')!r}")
    paths = {split: [str(Path(file).absolute()) for file in given] for split, given in files.items()}
    kinds = {BUILDERS[Path(path).suffix] for given in paths.values() for path in given}
    if len(kinds) > 1:
        raise InputError(f"`files`: the files of the task {name!r} have different formats: {', '.join(sorted(kinds))}")
    without = {key: None for key, split in used.items() if split not in files}
    data = {"dataset_path": kinds.pop(), "dataset_name": None, "dataset_kwargs": {"data_files": paths}}
    return {"task": name, **data, **without, **({"process_docs": hellaswag_documents} if name == "hellaswag" else {})}


def hellaswag_documents(rows: Any) -> Any:
    """Documents of HellaSwag by lm-eval's own rule. Rows with one cleaned context `ctx` instead of `ctx_a` and `ctx_b` keep it
    unchanged: lm-eval would capitalise the first letter of `ctx_b`."""
    from lm_eval.tasks.hellaswag.utils import process_docs

    if "ctx_a" not in rows.column_names:
        rows = rows.map(lambda row: {"ctx_a": row["ctx"], "ctx_b": ""})
    return process_docs(rows)


def documents_of(task: Any, limit: int | None) -> dict[str, Any]:
    """The number of evaluated documents of a task, the digest of their content, and the prompt settings.

    Prompts that are code are not included; the digest of the documents and the version of the task identify them.
    """
    documents = task.eval_docs
    digest = hashlib.sha256()
    for document in islice(documents, limit):
        digest.update(json.dumps(document, sort_keys=True, default=str).encode() + b"\n")
    config = task.config
    told = {key: value for key in FACTS if isinstance(value := getattr(config, key, None), str | int)}
    return {
        "version": str(task.VERSION),
        "documents": min(len(documents), limit or len(documents)),
        "digest": digest.hexdigest(),
        **told,
    }


def check_documents(tasks: dict[str, Any], facts: dict[str, Any], limit: int | None) -> None:
    """Raise InputError unless the documents of the tasks match `facts`."""
    for name, task in tasks.items():
        if documents_of(task, limit)["digest"] != facts.get(name, {}).get("digest"):
            raise InputError(f"the documents of the task {name!r} differ from the retrieved ones; run retrieve_tasks again")
