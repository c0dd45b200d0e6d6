# Which files a target asks for: of all cells, or of those of a kind. Defines no rules.


def made_of_cells(what, cells=None):
    """The checkpoints, or what else is made, of all compressed cells or of `cells`."""
    cells = [cell for cell in PLAN.cells if cell.method] if cells is None else cells
    return list(dict.fromkeys(PLAN.paths.made(cell, what) for cell in cells))


def recovered_of_cells():
    """The recovered checkpoints of all cells, dense ones included."""
    return list(
        dict.fromkeys(
            f"{PLAN.paths.recovered(cell)}/checkpoint/manifest.json"
            for cell in PLAN.cells
            if cell.recovery and PLAN.recovers(cell.recovery)
        )
    )


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
        cells = PLAN.cells.of(kind) if kind else PLAN.cells
    for cell in cells:
        names = {key: getattr(cell, key) for key in sections}
        labels = {
            key: PLAN.labels[sections[key]][name] for key, name in names.items() if name
        }
        if all(f"{{{key}}}" not in path or key in labels for key in sections):
            found[path.format(**labels)] = None
    return list(found)


def of_methods(name):
    """The file `name` of every method that is fitted: of those that cells have, or that these choose between."""
    found = {}
    for path in of_cells("results/{model}/{calibration}/{method}"):
        found |= dict.fromkeys(PLAN.paths.of_members(*path.split("/")[1:], name))
    return list(found)


def results_of(kind):
    return [PLAN.paths.result(cell) for cell in PLAN.cells.of(kind)]


def table_of(kind):
    """The table of a kind of evaluation, if it has one of its own and the experiments have any."""
    tabulated = EVALUATIONS[kind].table and PLAN.cells.of(kind)
    return [f"results/tables/{kind}.csv"] if tabulated else []


def moments_of_cells():
    """Statistics that the cells of the report are made from."""
    cells = [
        cell for cell in PLAN.cells.of("perplexity") if PLAN.cells.reads_moments(cell)
    ]
    return of_cells(
        "results/{model}/{calibration}/statistics/moments/manifest.json", cells=cells
    )


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
    names = dict.fromkeys(
        text for cell in PLAN.cells for text in PLAN.cells.texts_of(cell)
    )
    return [f"results/texts/{PLAN.labels['texts'][name]}.parquet" for name in names]


def tasks_of_cells():
    return of_cells("results/tasks/{evaluation}.json", "accuracy")


def examples_of_cells():
    names = dict.fromkeys(
        name for cell in PLAN.cells for name in PLAN.cells.tasks_of(cell)
    )
    return [f"results/examples/{PLAN.task_label(name)}/task.json" for name in names]


def sources_of_cells():
    """What retrieval makes of every model, before any of it is tuned."""
    labels = dict.fromkeys(PLAN.labels["models"][cell.model] for cell in PLAN.cells)
    made = lambda label: "base" if PLAN.tuned(label) else "model"
    return [f"results/{label}/{made(label)}.json" for label in labels]


def overlaps_of_cells():
    pairs = {}
    for cell in PLAN.cells.of("perplexity"):
        if cell.calibration:
            evaluation, calibration = PLAN.cells.texts_of(cell)
            pairs[calibration, evaluation] = None
    labels = PLAN.labels["texts"]
    return [f"results/texts/overlap/{labels[c]}/{labels[e]}.json" for c, e in pairs]


def outcome():
    """What a whole run makes: the table of every kind of evaluation in the experiments, of losses what is drawn and the
    checkpoints' cards, and the exports that are asked for."""
    drawn = [rules.cards, rules.tables, rules.figures, rules.report]
    losses = [one.output for one in drawn] if PLAN.cells.of(PLAIN) else []
    return [losses, *map(table_of, EVALUATIONS), rules.exports.input]
