"""One kind of evaluation per file, registered by `winnow.evaluation.base.EVALUATIONS`."""
