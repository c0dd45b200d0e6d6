# Which files jobs read (functions of wildcards). Defines no rules.


def of_user(files):
    """Files that no rule makes. Their digests are in params, so their times say nothing; see `stage`."""
    return [ancient(file) for file in files]


def local_files(wildcards):
    return of_user(PLAN.local_model_files(wildcards.model))


def model_as_compressed(wildcards):
    """What `finetune` made, of a model that is tuned first."""
    if PLAN.tuned(wildcards.model):
        return {"tuned": "results/{model}/tuned/manifest.json"}
    return base_model(wildcards)


def base_model(wildcards):
    """What `dequantize` made, of a model in a GGUF file; the files of the others are read as they are."""
    if PLAN.dequantized(wildcards.model):
        return {"dequantized": "results/{model}/dequantized/manifest.json"}
    return {"files": local_files(wildcards)}


def text_files(wildcards):
    return of_user(PLAN.preset("texts", wildcards.text).files)


def text_of_windows(wildcards):
    section = (
        "calibrations"
        if wildcards.windows in PLAN.names["calibrations"]
        else "evaluations"
    )
    return f"results/texts/{PLAN.text_label(section, wildcards.windows)}.parquet"


def moments_of_clustering(wildcards):
    if PLAN.clusterings()[wildcards.clustering].needs():
        return "results/{model}/{calibration}/statistics/moments/manifest.json"
    return []


def of_members(name):
    """The file `name` of a method, or of each of the methods that it chooses between."""
    return lambda w: PLAN.paths.of_members(w.model, w.calibration, w.method, name)


factors_of_method = of_members("factors/{shard}/manifest.json")


def predicted_for_budget(wildcards):
    """The predicted losses of a method's factors, if the budget's allocation reads them (they take a backward pass), or those
    around the model that the budget makes."""
    allocation = PLAN.allocation(wildcards.budget)
    if not allocation.predicts():
        return []
    if allocation.rounds():
        folder = f"results/{wildcards.model}/{wildcards.calibration}/{wildcards.method}"
        return [f"{folder}/{wildcards.budget}/predicted.parquet"]
    return of_members("predicted.parquet")(wildcards)


def times_for_budget(wildcards):
    """The measured times of the method's forms, if the budget's allocation bounds the time."""
    label = PLAN.timing_label(wildcards.method, wildcards.budget)
    return f"results/{wildcards.model}/times/{label}.json" if label else []


def learned_for_budget(wildcards):
    """The sizes that a job of their own has learned, if the budget's allocation is such."""
    if not PLAN.allocation(wildcards.budget).learns:
        return []
    return "results/{model}/{calibration}/{method}/{budget}/learned.json"


def overlap_check(wildcards):
    calibration = PLAN.text_label("calibrations", wildcards.calibration)
    evaluation = PLAN.text_label("evaluations", wildcards.evaluation)
    return f"results/texts/overlap/{calibration}/{evaluation}.json"


def before_recovery(folder, first):
    """The checkpoint that a recovery starts from: that of the one that it is `after`, or `first`; `folder` holds the recoveries."""

    def path(wildcards):
        after = PLAN.preset("recoveries", wildcards.recovery).after
        if after is None:
            return first
        return f"{folder}/{PLAN.labels['recoveries'][after]}/checkpoint/manifest.json"

    return path


def gradients_of_recovery(wildcards):
    """Statistics of gradients, for a recovery that reads them."""
    if PLAN.preset("recoveries", wildcards.recovery).reads_gradients:
        return "results/{model}/{calibration}/statistics/gradients/manifest.json"
    return []


def evaluated_checkpoint(wildcards):
    """The checkpoint that is evaluated: the compressed one, or what its recovery made of it."""
    name = PLAN.names["recoveries"][wildcards.recovery]
    if PLAN.recovers(name):
        return "results/{model}/{calibration}/{method}/{budget}/{recovery}/checkpoint/manifest.json"
    return "results/{model}/{calibration}/{method}/{budget}/checkpoint/manifest.json"


def read_by_study(wildcards):
    """What a study's measurement reads beside the model: statistics, windows, the checkpoints of its cells."""
    folder, at = f"results/{wildcards.model}", PLAN.studies.at(wildcards.model)
    known = {
        "moments": f"{folder}/{wildcards.calibration}/statistics/moments/manifest.json",
        "windows": f"{folder}/tokens/{wildcards.calibration}.safetensors",
        "evaluation": f"{folder}/tokens/{PLAN.labels['evaluations'][at.evaluation]}.safetensors",
        "checkpoints": [
            own["manifest"]
            for own in PLAN.studies.checkpoints(wildcards.study, wildcards.model)
        ],
    }
    return {key: known[key] for key in study_of(wildcards.study).reads}
