# What a kind of evaluation reads and asks for. Defines no rules.

READ = {  # what an evaluation can read beside the model
    "tokens": "results/{model}/tokens/{evaluation}.safetensors",
    "tasks": "results/tasks/{evaluation}.json",
    "files": task_files,
    "test": rows_of_task("test.parquet"),
    "facts": rows_of_task("task.json"),
}
OVERLAP = {
    "tokens": overlap_check,
    "test": rows_check,
}  # that the calibration shares nothing with it


def read_by_evaluation(kind, checkpoint=None):
    """What a job reads that evaluates the dense model, or a checkpoint."""
    evaluation = EVALUATIONS[kind]
    found = {name: READ[name] for name in evaluation.reads}
    if checkpoint:
        found |= {"checkpoint": checkpoint}
        found |= {
            "overlap": OVERLAP[name] for name in evaluation.reads if name in OVERLAP
        }
        if evaluation.paired:
            found |= {"dense": "results/{model}/dense/{evaluation}.json"}
        found |= kept_by_evaluation(kind)
    return {"model": "results/{model}/model.json", **found}


def kept_by_evaluation(kind):
    """What a job that evaluates the dense model makes beside its result."""
    states = {"states": "results/{model}/dense/{evaluation}.states.safetensors"}
    return states if EVALUATIONS[kind].keeps else {}


def asked_by_evaluation(kind, name, compressed):
    """What a job that evaluates asks for. A batch changes no number beyond rounding; `stream` is 1 where the weights of one
    block are in memory at a time, as the model's `load` says."""
    evaluation = EVALUATIONS[kind]
    streams = {"stream": streamed} if evaluation.streams else {}
    return {
        **evaluation.batch,
        **streams,
        "mem_mb": memory(name, evaluation.memory_mb[compressed]),
        "runtime": minutes(evaluation.minutes),
    }
