# What factors are fitted with (functions of wildcards), once and again. Defines no rules.


def fitted_with(what):
    """The input `what` (moments, gradients, clusters, outer) of a shard of a method's factors, if the method needs it: of the
    embeddings and the head, `outer` has all statistics."""

    def path(wildcards):
        needs = PLAN.needs(wildcards.method)
        if wildcards.shard == "outer":
            needs = {"outer"} if needs else set()
        if what not in needs:
            return []
        folder = f"results/{wildcards.model}/{wildcards.calibration}"
        if what == "clusters":
            return (
                f"{folder}/clusters/{PLAN.clustering_label(wildcards.method)}.parquet"
            )
        return f"{folder}/statistics/{what}/manifest.json"

    return path


def refitted_with(what):
    """The input `what` (moments, gradients, outer) of jobs that read a method's factors, where they fit them again."""

    def path(wildcards):
        if not PLAN.refits(wildcards.model, wildcards.method):
            return []
        if what == "outer":
            return PLAN.paths.outer(
                wildcards.model, wildcards.calibration, wildcards.method
            )
        if what not in PLAN.refits_with(wildcards.method):
            return []
        return f"results/{wildcards.model}/{wildcards.calibration}/statistics/{what}/manifest.json"

    return path


REFITTED_WITH = {
    what: refitted_with(what) for what in ("moments", "gradients", "outer")
}
