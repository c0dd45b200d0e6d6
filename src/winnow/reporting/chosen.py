"""What an allocation chose: the structure and the size of every matrix, by layer and role."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from winnow.io.tensors import BYTES
from winnow.models.architectures import ROLES, Matrix, matrices_of, named_by, outer_of
from winnow.numerics.grids import forms_of

if TYPE_CHECKING:
    from winnow.io.records import GroupRecord

SHADES = 10
ROTATED = "rounded with a rotation"
BITS = {"rounded": "b", ROTATED: "r"}  # what stands after the bits of a kind
Labels = tuple[str, ...]  # of a model, a calibration, a method and a budget


class Size(NamedTuple):
    """What is stored of the matrices of one role in one layer; the sizes of several (experts) as a range."""

    text: str
    shade: int  # of SHADES, by the share of bytes kept


class Chosen(NamedTuple):
    """The sizes of a budget, and the methods that have them all."""

    methods: list[str]
    kinds: str  # what the sizes are of, and how many matrices or groups have each kind
    roles: list[str]
    layers: list[tuple[int, list[Size | None]]]


def labels_of(provenance: Mapping[str, Any]) -> Labels:
    """The labels by which results of one cell before its recovery belong together."""
    wildcards = provenance.get("wildcards", {})
    return tuple(wildcards.get(name, "") for name in ("model", "calibration", "method", "budget"))


def name_of(manifest: Mapping[str, Any]) -> str:
    """The name of a model in tables, from its manifest."""
    return manifest["provenance"]["wildcards"]["model"].rpartition("-")[0]


def dense_bits(models: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """{model: bits of a stored number of its compressible matrices}, the mean if they differ, from the manifests of models."""
    found = {}
    for manifest in models:
        tensors = manifest["tensors"]
        counts = [(m.shape[0] * m.shape[1], f"{m.module}.weight") for m in matrices_of(manifest["model_type"], tensors)]
        total = sum(count * BYTES[tensors[name]["dtype"]] for count, name in counts)
        found[name_of(manifest)] = 8 * total / sum(count for count, _ in counts)
    return found


def chosen_sizes(allocations: Sequence[Mapping[str, Any]], models: Iterable[Mapping[str, Any]]) -> dict[tuple, list[Chosen]]:
    """{(model, calibration, budget), by their names: the sizes of its methods}, from allocation.json files and the manifests of
    models. Methods with the same sizes, as those of a uniform allocation, are listed once; of several calibration seeds the
    first is shown."""
    matrices = {}
    for one in models:
        family, tensors = one["model_type"], one["tensors"]
        every = [*matrices_of(family, tensors), *outer_of(family, tensors, one["tied"])]
        matrices[one["provenance"]["wildcards"]["model"]] = {m.name: m for m in every}
    found: dict[tuple, dict[str, Chosen]] = {}
    seen = set()
    for allocation in allocations:
        spec, label = allocation["provenance"]["params"]["spec"], labels_of(allocation["provenance"])[0]
        names = spec["names"]
        if tuple(names.items()) in seen:
            continue
        seen.add(tuple(names.items()))
        own = _chosen(allocation["groups"], spec["presets"]["method"]["structure"], matrices[label])
        place = found.setdefault((names["model"], names["calibration"], names["budget"]), {})
        place.setdefault(repr(own), own).methods.append(names["method"])
    return {key: list(place.values()) for key, place in found.items()}


def _chosen(groups: Sequence[GroupRecord], structure: Mapping[str, Any], matrices: Mapping[str, Matrix]) -> Chosen:
    stored: dict[tuple[int, str], list[tuple[str, int | None, int, int]]] = {}
    counts: Counter[str] = Counter()
    for group in groups:
        span, parts, kind, number = _read(group, structure, matrices)
        counts[kind] += 1
        for layer in span:
            for role in parts:
                stored.setdefault((layer, role), []).append((kind, number, group["stored_bytes"], group["dense_bytes"]))
    letters = _letters([kind for kind in counts if kind != "dense"])
    roles = sorted({role for _, role in stored}, key=lambda role: (ROLES.index(role) if role in ROLES else len(ROLES), role))
    layers = sorted({layer for layer, _ in stored})
    sizes = {place: _size(found, letters) for place, found in stored.items()}
    legend = [f"{letter}: {kind}, {counts[kind]}" if letter else f"{kind}, {counts[kind]}" for kind, letter in letters.items()]
    legend += [f"dense, {counts['dense']}"] if counts["dense"] else []
    return Chosen([], "; ".join(legend), roles, [(layer, [sizes.get((layer, role)) for role in roles]) for layer in layers])


def _read(
    group: GroupRecord, structure: Mapping[str, Any], matrices: Mapping[str, Matrix]
) -> tuple[range, list[str], str, int | None]:
    """(layers, roles, kind, size) of a group; the size of a rounded matrix is in bits, and None is dense."""
    name, _, member = group["group"].partition("@")
    span, *parts = name.split(".")
    first, _, last = span.partition("-")
    roles = [part for part in parts if not part.startswith("expert")]
    if group["size"] is None or not group["size"]:
        return range(int(first), int(last or first) + 1), roles, "dense", None
    own = structure
    if member:
        own = next(option for option in structure["members"] if option["kind"] == member)
    if "parts" in own:
        own = own["parts"][named_by(roles[0], own["parts"])]
    size = group["size"]
    if own["kind"] == "rounded":
        groups = own["group"] if isinstance(own["group"], list) else [own["group"]]
        turns = own.get("rotations", ["none"])
        form = forms_of(*matrices[name].shape, own["bits"], own["grids"], groups, turns)[size - 1]
        return range(int(first), int(last or first) + 1), roles, "rounded" if form.rotation == "none" else ROTATED, form.bits
    return range(int(first), int(last or first) + 1), roles, own["kind"], size


def _letters(kinds: list[str]) -> dict[str, str]:
    """{kind: what stands before its sizes}: nothing if there is one kind, else its first letters; `b` or `r` after bits."""
    others = [kind for kind in kinds if kind not in BITS]
    found = {kind: f"{letter} (bits)" for kind, letter in BITS.items() if kind in kinds}
    for kind in others:
        initials = [kind[:length] for length in range(1, len(kind) + 1)]
        found[kind] = (
            next(start for start in initials if start not in (*BITS.values(), *found.values()))
            if len(others) > 1 or found
            else ""
        )
    return found


def _size(found: list[tuple[str, int | None, int, int]], letters: Mapping[str, str]) -> Size:
    """What the groups of one place have, in a word."""
    texts = []
    for kind in dict.fromkeys(kind for kind, *_ in found):
        numbers = [number for own, number, *_ in found if own == kind and number is not None]
        span = f"{min(numbers)}\u2013{max(numbers)}" if numbers and min(numbers) < max(numbers) else str(*dict.fromkeys(numbers))
        texts.append("dense" if kind == "dense" else f"{span}{BITS[kind]}" if kind in BITS else f"{letters[kind]}{span}")
    share = sum(stored for *_, stored, _ in found) / sum(dense for *_, dense in found)
    return Size(" ".join(texts), min(SHADES - 1, int(SHADES * share)))
