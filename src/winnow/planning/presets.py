"""The presets of the default configuration: points of the design space, by the paper that each comes from, and recoveries."""

from __future__ import annotations

from typing import Any

# Those of the default experiment; config/studies/ runs the others. Two that everyone knows, the best recipes of others for
# factors and for rounding, and what winnow recommends without rounding and with it.
DEMO = ["svd", "whitened", "svd_llm_v2_steep", "rounded_gram", "winnow_factored", "winnow"]
PAPER_7, PAPER_8 = "HyperTensor Paper VII", "HyperTensor Paper VIII"
FFSPLIT, SVD_LLM, GRC = "FFSplit, arXiv 2401.04044", "SVD-LLM, arXiv 2403.07378", "GRC, HyperTensor Paper I"
SVD_LLM_V2 = "SVD-LLM V2, arXiv 2503.12340"
COUPLING = "cross-layer subspace coupling, arXiv 2605.30836"
RTN = "round to nearest, as in GPTQ, arXiv 2210.17323"
WEIGHTS, GRAM = {"kind": "weights"}, {"kind": "gram"}
LOW_RANK = {"kind": "low_rank"}
FACTORED = [{"kind": "gauge_fixed"}, {"kind": "neuron_slice", "criterion": "loss"}, {"kind": "affine_block"}]
GPTQ = "GPTQ, arXiv 2210.17323"
HQQ, AWQ = "HQQ, Badri and Shaji 2023", "AWQ, arXiv 2306.00978; channel scales stored"
# Peers use groups of 128 with zero points and scales by the largest number. FORMS are the forms that the programme chooses from;
# adding smaller groups and zero points would lower the predicted loss by less than 1 % and store more, see docs/rounding.md.
PEER = {"kind": "rounded", "group": 128, "grids": ["asymmetric"]}
FORMS = {"kind": "rounded", "bits": [2, 3, 4, 5, 6, 8], "group": 128, "grids": ["full"], "scales": "unbiased"}
FED_BACK = FORMS | {"rounding": "feedback"}
# Rounded factors and neurons of the sizes that pay below 0.2 of the bytes, see docs/rounding.md; more of them were rarely chosen.
COMPOSED = [
    {"kind": "rounded_neuron_slice", "criterion": "loss", "bits": [2], "neurons": [0.5, 0.75]},
    {"kind": "rounded_low_rank", "bits": [2, 3], "ranks": [0.25]},
]
ROWS_8BIT = {"bits": [8], "group": None, "grids": ["symmetric"], "scales": "largest", "rounding": "nearest"}
SPQ = [
    {"kind": "by_target", "parts": {"attention": {"kind": "rounded_low_rank", **ROWS_8BIT, "gauge": "split"}}},
    {"kind": "rounded_neuron_slice", "criterion": "activation", "correction": "none", **ROWS_8BIT},
    {"kind": "rounded", **ROWS_8BIT},
]
LQER = {"kind": "bypass", "kept_fraction": 1 / 128, "kept_bits": 8, "order": "remainder_first"}
PER_TYPE: dict[str, Any] = {"kind": "per_type"}
ILP = {"kind": "ilp"}
# name: (paper, structure with its options, metric with its options or None if the structure minimises the output error[,
# allocation with its options, if the recipe has its own])
_PRESETS: dict[str, tuple[Any, ...]] = {
    "svd": ("Eckart and Young 1936", LOW_RANK, WEIGHTS),
    "weight_norm": (PAPER_7 + " (proxy)", LOW_RANK, {"kind": "weight_norm"}),
    "asvd": ("ASVD, arXiv 2312.05821", LOW_RANK, {"kind": "mean_abs", "alpha": 0.5}),
    "whitened": (SVD_LLM + "; Swift-SVD", LOW_RANK, GRAM),
    "asvd_max": ("ASVD, arXiv 2312.05821", LOW_RANK, {"kind": "max_abs", "alpha": 0.5}),
    "second_moment": ("diagonal of the Gram metric", LOW_RANK, {"kind": "second_moment"}),
    "fwsvd": ("FWSVD, arXiv 2207.00112", LOW_RANK, {"kind": "fisher"}),
    "kfac": ("LEMS / KFAC-SVD; KFAC, arXiv 1503.05671", LOW_RANK, {"kind": "two_sided"}),
    "svd_gauge_fixed": ("none known", {"kind": "gauge_fixed"}, WEIGHTS),
    "whitened_gauge_fixed": ("none known", {"kind": "gauge_fixed"}, GRAM),
    "grc": (GRC, {"kind": "shared_basis"}, WEIGHTS),
    "grc_whitened": (GRC + ", whitened", {"kind": "shared_basis"}, GRAM),
    "grc_inputs": (GRC + ", on activations", {"kind": "shared_basis", "basis": "inputs"}, GRAM),
    "basis_sharing": ("Basis Sharing, arXiv 2410.03765", {"kind": "basis_sharing", "layers": 2}, GRAM),
    "bypass": (PAPER_8, {"kind": "bypass", "kept": 8, "remainder": {"kind": "shared_basis"}}, WEIGHTS),
    "clusters_norm": (PAPER_7, {"kind": "cluster", "clusters": 4, "by": "norm"}, WEIGHTS),
    "clusters_cosine": (PAPER_7, {"kind": "cluster", "clusters": 4, "by": "cosine"}, WEIGHTS),
    "clusters_activation": (PAPER_7, {"kind": "cluster", "clusters": 4, "by": "activation"}, WEIGHTS),
    "clusters_coactivation": (PAPER_7, {"kind": "cluster", "clusters": 4, "by": "co_activation"}, WEIGHTS),
    "clusters_neurons": (
        PAPER_7 + ", neuron axis, whitened",
        {"kind": "cluster", "clusters": 4, "axis": "neurons", "by": "cosine"},
        GRAM,
    ),
    "clusters_random": (PAPER_7 + " (control)", {"kind": "cluster", "clusters": 4, "by": "random"}, WEIGHTS),
    "tiers_activation": (PAPER_7 + " (activation-weighted)", {"kind": "tiers", "score": "mean_abs"}, WEIGHTS),
    "tiers_weight_norm": (PAPER_7 + " (weight norm)", {"kind": "tiers", "score": "weight_norm"}, WEIGHTS),
    "tiers_random": (PAPER_7 + " (control)", {"kind": "tiers", "score": "random"}, WEIGHTS),
    "ffsplit": (FFSPLIT, {"kind": "split", "exact": 0.25, "criterion": "activation"}, WEIGHTS),
    "ffsplit_whitened": (FFSPLIT + ", whitened", {"kind": "split", "exact": 0.25, "criterion": "activation_x_row"}, GRAM),
    "ffsplit_affine": (FFSPLIT + ", with R2_lin", {"kind": "split_affine"}, None),
    "ffsplit_dropped": (FFSPLIT + ", light part dropped", {"kind": "split_affine", "light": "dropped"}, None),
    "r2lin": ("R2_lin, arXiv 2606.19379", {"kind": "affine_block"}, None),
    "coupled": (COUPLING, {"kind": "coupled"}, WEIGHTS),
    "coupled_tied": (COUPLING, {"kind": "coupled", "tying": "tied"}, WEIGHTS),
    "coupled_anchored": (COUPLING, {"kind": "coupled", "anchor_strength": 1.0}, GRAM),
    "coupled_one_sided": (COUPLING + ", one side", {"kind": "coupled", "tying": "grouped", "sides": "one"}, GRAM),
    "mixed": ("several; chosen by predicted loss", {"kind": "mixed"}, {"kind": "two_sided"}),
    "kfac_gauge_fixed": ("none known", {"kind": "gauge_fixed"}, {"kind": "two_sided"}),
    "neurons_by_loss": ("MoDeGPT, arXiv 2408.09632, by predicted loss", {"kind": "neuron_slice", "criterion": "loss"}, None),
    "modegpt_mlp": ("MoDeGPT, arXiv 2408.09632", {"kind": "neuron_slice"}, None),
    "svd_llm_v2": (SVD_LLM_V2, LOW_RANK, GRAM, PER_TYPE),
    "svd_llm_v2_steep": (SVD_LLM_V2 + ", shares that differ more", LOW_RANK, GRAM, PER_TYPE | {"smallest": 0.5}),
    "whitened_learned": ("ARA-style, arXiv 2510.19389", LOW_RANK, GRAM, {"kind": "learned"}),
    "whitened_ilp": ("sizes by integer programme", LOW_RANK, GRAM, ILP),
    "winnow": (
        "recommended: structures, bits and sizes by integer programme",
        {"kind": "mixed", "members": [*FACTORED, FED_BACK, *COMPOSED]},
        {"kind": "two_sided"},
        ILP,
    ),
    "winnow_factored": (
        "`winnow` without rounding: structures and sizes by integer programme",
        {"kind": "mixed"},
        {"kind": "two_sided"},
        ILP,
    ),
    "rounded_8bit": (RTN, {"kind": "rounded", "bits": [8]}, WEIGHTS),
    "rounded_4bit": (RTN, {"kind": "rounded", "bits": [4]}, WEIGHTS),
    "rtn_4bit": (RTN + ", asymmetric", PEER | {"bits": [4]}, WEIGHTS),
    "rtn_3bit": (RTN + ", asymmetric", PEER | {"bits": [3]}, WEIGHTS),
    "gptq_4bit": (GPTQ, PEER | {"bits": [4], "rounding": "feedback"}, GRAM),
    "gptq_3bit": (GPTQ, PEER | {"bits": [3], "rounding": "feedback"}, GRAM),
    "lqer": (
        "LQER, arXiv 2402.02446",
        LQER | {"remainder": {"kind": "rounded", "bits": [4]}},
        {"kind": "mean_abs", "alpha": 1.0},
    ),
    "svd_llm_gptq": (
        SVD_LLM + ", both factors by GPTQ",
        PEER | {"kind": "rounded_low_rank", "bits": [4], "group": None, "scales": "largest", "gauge": "split"},
        GRAM,
    ),
    "spq": ("SPQ, arXiv 2602.18420; sizes by integer programme", {"kind": "mixed", "members": SPQ}, WEIGHTS, ILP),
    "hqq_4bit": (HQQ, {"kind": "rounded_offsets", "bits": [4]}, WEIGHTS),
    "hqq_3bit": (HQQ, {"kind": "rounded_offsets", "bits": [3]}, WEIGHTS),
    "awq_4bit": (AWQ, {"kind": "rounded_channels", "bits": [4]}, GRAM),
    "awq_3bit": (AWQ, {"kind": "rounded_channels", "bits": [3]}, GRAM),
    "rounded_nearest": ("round to nearest; bits by integer programme", FORMS, GRAM, ILP),
    "rounded_gram": (GPTQ + "; bits by integer programme", FED_BACK, GRAM, ILP),
    "rounded_two_sided": (
        "feedback on both sides as in YAQA, arXiv 2505.22988; bits by integer programme",
        FED_BACK,
        {"kind": "two_sided"},
        ILP,
    ),
}


def methods() -> dict[str, dict[str, Any]]:
    """The section `methods` of the default configuration."""
    found: dict[str, dict[str, Any]] = {}
    for name, (paper, *parts) in _PRESETS.items():
        given = zip(("structure", "metric", "allocation"), parts, strict=False)
        found[name] = {"paper": paper} | {key: dict(value) for key, value in given if value is not None}
    return found


def recoveries() -> dict[str, dict[str, Any]]:
    """The section `recoveries` of the default configuration."""
    plain: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in ("none", "sequential", "refine", "distill")}
    plain["sequential_weighted"] = {"kind": "sequential", "objective": "shifted", "outputs": "gradient"}
    chained = {"fitted_refined": {"kind": "refine", "after": "sequential"}}
    chained["fitted_refined_distilled"] = {"kind": "distill", "after": "fitted_refined"}
    chained["rounded_again"] = {"kind": "sequential", "outputs": "gradient"}
    chained["rounded_refined"] = {"kind": "refine", "after": "rounded_again"}
    chained["rounded_refined_distilled"] = {"kind": "distill", "after": "rounded_refined"}
    return plain | {"distill_lora": {"kind": "distill", "parameters": "lora"}} | chained


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the presets of this module that its experiments name and that it does not define itself: the default
    configuration is then not needed for them."""
    experiments = config.get("experiments")
    given = [e for e in experiments.values() if isinstance(e, dict)] if isinstance(experiments, dict) else []
    added = {}
    for section, known in (("methods", methods()), ("recoveries", recoveries())):
        own = config.get(section, {})
        listed = (e.get(section, ["none"] if section == "recoveries" else []) for e in given)  # by default there is no recovery
        names = [name for names in listed if isinstance(names, list) for name in names if isinstance(name, str)]
        found: dict[str, Any] = {}
        while names:
            name = names.pop(0)
            if name in known and isinstance(own, dict) and name not in own and name not in found:
                found[name] = known[name]
                names += [known[name]["after"]] if "after" in known[name] else []
        if found:
            added[section] = {**own, **found}
    return {**config, **added}
