# Which files a rule reads (functions of wildcards), and which files a target asks for (of all cells). No rule stands here.


def local_files(wildcards):
    return PLAN.local_model_files(wildcards.model)


def text_files(wildcards):
    return PLAN.preset("texts", wildcards.text).files


def task_files(wildcards):
    return PLAN.task_files(wildcards.evaluation)


def text_of_windows(wildcards):
    section = (
        "calibrations"
        if wildcards.windows in PLAN.names["calibrations"]
        else "evaluations"
    )
    return f"results/texts/{PLAN.text_label(section, wildcards.windows)}.parquet"


def fitted_with(what):
    """The input `what` (moments, gradients, clusters) of a method's factors, if the method needs it."""

    def path(wildcards):
        if what not in PLAN.needs(wildcards.method):
            return []
        folder = f"results/{wildcards.model}/{wildcards.calibration}"
        if what == "clusters":
            return (
                f"{folder}/clusters/{PLAN.clustering_label(wildcards.method)}.parquet"
            )
        return f"{folder}/statistics/{what}/manifest.json"

    return path


def moments_of_clustering(wildcards):
    if PLAN.clusterings()[wildcards.clustering].needs():
        return "results/{model}/{calibration}/statistics/moments/manifest.json"
    return []


def factors_of_method(wildcards):
    folder = (
        f"results/{wildcards.model}/{wildcards.calibration}/{wildcards.method}/factors"
    )
    return [f"{folder}/{shard}/manifest.json" for shard in PLAN.shards(wildcards.model)]


def predicted_for_budget(wildcards):
    """The predicted losses of a method's factors, if the budget's allocation reads them (they take a backward pass), or those
    around the model that the budget makes."""
    allocation = PLAN.allocation(wildcards.budget)
    if not allocation.predicts():
        return []
    folder = f"results/{wildcards.model}/{wildcards.calibration}/{wildcards.method}"
    own = f"/{wildcards.budget}" if allocation.rounds() else ""
    return f"{folder}{own}/predicted.parquet"


def overlap_check(wildcards):
    calibration = PLAN.text_label("calibrations", wildcards.calibration)
    evaluation = PLAN.text_label("evaluations", wildcards.evaluation)
    return f"results/texts/overlap/{calibration}/{evaluation}.json"


def of_cells(path, kind=None, cells=None):
    """All files of a path pattern with the labels of the cells in it: of `cells`, of those whose evaluation is of a kind, or of all.

    Dense cells have no method, budget, ...
    """
    sections = {
        "model": "models",
        "calibration": "calibrations",
        "method": "methods",
        "budget": "budgets",
        "recovery": "recoveries",
        "evaluation": "evaluations",
    }
    found = {}
    if cells is None:
        cells = PLAN.cells_of(kind) if kind else PLAN.cells
    for cell in cells:
        names = {key: getattr(cell, key) for key in sections}
        labels = {
            key: PLAN.labels[sections[key]][name] for key, name in names.items() if name
        }
        if all(f"{{{key}}}" not in path or key in labels for key in sections):
            found[path.format(**labels)] = None
    return list(found)


def results_of(kind):
    return [PLAN.result(cell) for cell in PLAN.cells_of(kind)]


def table_of(kind):
    """The table of a kind of evaluation, if the experiments have any."""
    return [f"results/tables/{kind}.csv"] if PLAN.cells_of(kind) else []


def clusters_of_cells():
    found = {}
    for path in of_cells("results/{model}/{calibration}/{method}"):
        folder, method = path.rsplit("/", 1)
        if label := PLAN.clustering_label(method):
            found[f"{folder}/clusters/{label}.parquet"] = None
    return list(found)


def spectra_of_matrices():
    """Spectra of the methods that fit every matrix by itself: only those are spectra of matrices."""
    paths = of_cells(
        "results/{model}/{calibration}/{method}/spectra.parquet", "perplexity"
    )
    kind = lambda path: PLAN.structure(path.split("/")[3]).kind()
    return [path for path in paths if kind(path) == "low_rank"]


def windows_of_cells():
    calibration = of_cells("results/{model}/tokens/{calibration}.safetensors")
    return calibration + of_cells(
        "results/{model}/tokens/{evaluation}.safetensors", "perplexity"
    )


def texts_of_cells():
    names = dict.fromkeys(text for cell in PLAN.cells for text in PLAN.texts_of(cell))
    return [f"results/texts/{PLAN.labels['texts'][name]}.parquet" for name in names]


def tasks_of_cells():
    return of_cells("results/tasks/{evaluation}.json", "accuracy")


def overlaps_of_cells():
    pairs = {}
    for cell in PLAN.cells_of("perplexity"):
        if cell.calibration:
            evaluation, calibration = PLAN.texts_of(cell)
            pairs[calibration, evaluation] = None
    labels = PLAN.labels["texts"]
    return [f"results/texts/overlap/{labels[c]}/{labels[e]}.json" for c, e in pairs]


def outcome():
    """What a whole run makes: the table of every kind of evaluation in the experiments, of losses what is drawn and the
    checkpoints' cards, and the exports that are asked for."""
    made = {
        "perplexity": [rules.cards, rules.tables, rules.figures, rules.report],
        "latency": [rules.tabulate_latency],
        "accuracy": [rules.tabulate_accuracy],
    }
    tables = [one.output for kind in made if PLAN.cells_of(kind) for one in made[kind]]
    return [tables, rules.exports.input]
