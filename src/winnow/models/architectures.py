"""The modules of each model family, as data. A family is identified by the `model_type` of its config, never by a model's name.

To add one, add an entry to `ARCHITECTURES` (the list of layers, the module of each role below a layer, and the FFN's activation)
and a tiny configuration to `tests/conftest.py`; `tests/unit/test_architectures.py` checks the rest. A new role also needs the
site of its input.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from winnow.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from winnow.io.records import Shaped

ATTENTION_ROLES = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
FFN_ROLES = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")  # gate_up_proj: gate above up, in one matrix
ROLES = (*ATTENTION_ROLES, *FFN_ROLES)
# The matrices outside of the blocks, (vocabulary, width); `tied`: one matrix for the embeddings and the head.
OUTER_ROLES = ("embed_tokens", "lm_head", "tied")
OUTER = "outer"  # the shard of factors that has them
AT_ONCE = 1 << 22  # numbers of them that are fitted at a time
# The targets of a budget besides single roles; a fused matrix belongs to the same targets as the matrices in it.
TARGETS = {
    "ffn": FFN_ROLES,
    "attention": ATTENTION_ROLES,
    "qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "gate_up": ("gate_proj", "up_proj", "gate_up_proj"),
    "embeddings": ("embed_tokens", "tied"),
    "head": ("lm_head", "tied"),
}
Target = Literal["ffn", "attention", "qkv", "gate_up", "embeddings", "head", *ROLES]  # type: ignore[valid-type]

GRADIENTS = ("fisher", "gradient_gram")  # statistics of output gradients, which need a backward pass
# A site is a distinct input with one Gram matrix, shared by all matrices that read it.
SITES = {
    "q_proj": "attention_input",
    "k_proj": "attention_input",
    "v_proj": "attention_input",
    "qkv_proj": "attention_input",
    "o_proj": "attention_output",
    "gate_proj": "ffn_input",
    "up_proj": "ffn_input",
    "gate_up_proj": "ffn_input",
    "down_proj": "ffn_hidden",
    **{role: role for role in OUTER_ROLES},
}


@dataclass(frozen=True)
class Architecture:
    """Module names of a family; `activation` is the one between an FFN's first and last matrices.

    `transposed`: weights are stored (in, out), as in GPT-2's Conv1D. `positions`: rows of the position embeddings that no token
    uses, as in RoBERTa. `experts`: the module of a layer's experts; `expert_modules`: the matrices of one expert as named in the
    files. Layers without experts use `modules`. `embeddings` and `head`: the modules of the token embeddings and of the matrix
    that gives the logits; empty where they are not compressed."""

    layers: str
    modules: dict[str, str]
    activation: str
    transposed: bool = False
    positions: int = 0
    experts: str = ""
    expert_modules: dict[str, str] = field(default_factory=dict)
    embeddings: str = "model.embed_tokens"
    head: str = "lm_head"


@dataclass(frozen=True)
class Matrix:
    """One compressible matrix W (out, in), y = W x + b, as it is stored in the model."""

    layer: int
    role: str
    module: str
    site: str
    shape: tuple[int, int]  # (out, in)
    transposed: bool
    bias: bool
    activation: str = ""  # the activation module of the layer's FFN
    expert: int | None = None  # index in a mixture of experts; every expert has its own sites, since it receives its own tokens
    head: str = ""  # of tied embeddings: the module of the head, which has the same matrix

    @property
    def outer(self) -> bool:
        """Whether it is outside of the blocks: the embeddings, the head, or both."""
        return self.role in OUTER_ROLES

    @property
    def name(self) -> str:
        return f"{self.layer:03d}.{self.part}"

    @property
    def part(self) -> str:
        """Its name within the layer."""
        return self.role if self.expert is None else f"expert{self.expert:03d}.{self.role}"

    def beside(self, site: str) -> str:
        """The name of another site of the same FFN."""
        return site if self.expert is None else f"expert{self.expert:03d}.{site}"


_SEPARATE_ATTENTION = {role: f"self_attn.{role}" for role in ("q_proj", "k_proj", "v_proj", "o_proj")}
_GATED_FFN = ("gate_proj", "up_proj", "down_proj")
_GATED = _SEPARATE_ATTENTION | {role: f"mlp.{role}" for role in _GATED_FFN}
_BERT = {role: f"attention.self.{name}" for role, name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))}
_BERT |= {"o_proj": "attention.output.dense", "up_proj": "intermediate.dense", "down_proj": "output.dense"}

ARCHITECTURES = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"), Architecture("model.layers", _GATED, "mlp.act_fn")
    ),
    "qwen3_moe": Architecture(
        "model.layers", _GATED, "mlp.act_fn", experts="mlp.experts", expert_modules={role: role for role in _GATED_FFN}
    ),
    "mixtral": Architecture(
        "model.layers",
        _SEPARATE_ATTENTION,
        "",
        experts="mlp.experts",
        expert_modules={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    ),
    # Only the text part of the multimodal model.
    "gemma3": Architecture("language_model.layers", _GATED, "mlp.act_fn", embeddings="", head=""),
    "phi3": Architecture(
        "model.layers",
        {"qkv_proj": "self_attn.qkv_proj", "o_proj": "self_attn.o_proj"}
        | {"gate_up_proj": "mlp.gate_up_proj", "down_proj": "mlp.down_proj"},
        "mlp.activation_fn",
    ),
    "gpt2": Architecture(
        "transformer.h",
        {"qkv_proj": "attn.c_attn", "o_proj": "attn.c_proj", "up_proj": "mlp.c_fc", "down_proj": "mlp.c_proj"},
        "mlp.act",
        transposed=True,
        embeddings="transformer.wte",
    ),
    "opt": Architecture(
        "model.decoder.layers",
        _SEPARATE_ATTENTION | {"o_proj": "self_attn.out_proj", "up_proj": "fc1", "down_proj": "fc2"},
        "activation_fn",
        embeddings="model.decoder.embed_tokens",
    ),
    "gpt_neox": Architecture(
        "gpt_neox.layers",
        {
            "qkv_proj": "attention.query_key_value",
            "o_proj": "attention.dense",
            "up_proj": "mlp.dense_h_to_4h",
            "down_proj": "mlp.dense_4h_to_h",
        },
        "mlp.act",
        embeddings="gpt_neox.embed_in",
    ),
    "bert": Architecture("encoder.layer", _BERT, "intermediate.intermediate_act_fn", embeddings="", head=""),
    "roberta": Architecture("encoder.layer", _BERT, "intermediate.intermediate_act_fn", positions=2, embeddings="", head=""),
}


def matrices_of(model_type: str, tensors: Mapping[str, Shaped]) -> list[Matrix]:
    """All compressible matrices of a model, by layer and then by role.

    `tensors` maps canonical tensor names to records with a `shape`. Raises InputError for an unknown family, and for a layer
    that lacks a matrix of its family.
    """
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise InputError(f"model type {model_type!r} is not in src/winnow/models/architectures.py (known: {known})")
    family = ARCHITECTURES[model_type]
    prefix = _prefix(family.layers, tensors)
    layers = sorted({int(name[len(prefix) :].split(".")[0]) for name in tensors if name.startswith(prefix)})
    found = []
    for layer in layers:
        mixture = f"{prefix}{layer}.{family.experts}."
        experts = sorted({int(n[len(mixture) :].split(".")[0]) for n in tensors if family.experts and n.startswith(mixture)})
        for role, module in family.modules.items():
            name = f"{prefix}{layer}.{module}"
            if experts and role in FFN_ROLES:
                continue
            if f"{name}.weight" not in tensors:
                raise InputError(f"{name}.weight is missing from the {model_type} model")
            rows, columns = tensors[f"{name}.weight"]["shape"]
            shape = (columns, rows) if family.transposed else (rows, columns)
            bias = f"{name}.bias" in tensors
            activation = f"{prefix}{layer}.{family.activation}"
            found.append(Matrix(layer, role, name, SITES[role], shape, family.transposed, bias, activation))
        for expert in experts:
            for role, module in family.expert_modules.items():
                name = f"{mixture}{expert}.{module}"
                if f"{name}.weight" not in tensors:
                    raise InputError(f"{name}.weight is missing from the {model_type} model")
                (rows, columns), site = tensors[f"{name}.weight"]["shape"], f"expert{expert:03d}.{SITES[role]}"
                found.append(Matrix(layer, role, name, site, (rows, columns), False, False, f"{mixture}{expert}.act_fn", expert))
    return found


def outer_of(model_type: str, tensors: Mapping[str, Shaped], tied: Mapping[str, str]) -> list[Matrix]:
    """The token embeddings and the head of a model, which matrices_of has no part of: one matrix if the head is tied to the
    embeddings; none for a family that lacks them in `ARCHITECTURES`.

    `tied` maps names of tensors to those that they are tied to. Errors as for `matrices_of`."""
    layers, family = list(blocks_of(model_type, tensors)), ARCHITECTURES[model_type]
    prefix = _prefix(family.layers, tensors)
    bare = prefix == family.layers.partition(".")[2] + "."
    embeddings = family.embeddings.partition(".")[2] if bare else family.embeddings
    shared = f"{family.head}.weight" in tied and tied[f"{family.head}.weight"] == f"{embeddings}.weight"
    places = [(layers[0], "tied" if shared else "embed_tokens", embeddings)]
    places += [] if shared else [(layers[-1], "lm_head", family.head)]
    found = []
    for layer, role, name in places:
        if name and f"{name}.weight" in tensors:
            rows, columns = tensors[f"{name}.weight"]["shape"]
            bias = f"{name}.bias" in tensors
            found.append(Matrix(layer, role, name, SITES[role], (rows, columns), False, bias, head=family.head if shared else ""))
    return found


def by_rows(matrix: Matrix) -> Iterator[tuple[Matrix, slice]]:
    """Some rows of a matrix of independent rows at a time, as a matrix of its own, and which."""
    (m, n), each = matrix.shape, max(1, AT_ONCE // matrix.shape[1])
    for begin in range(0, m, each):
        rows = slice(begin, min(begin + each, m))
        yield replace(matrix, shape=(rows.stop - begin, n)), rows


def reaches_outer(targets: Iterable[str]) -> bool:
    """Whether targets name the embeddings or the head."""
    return any(set(TARGETS.get(target, ())) & set(OUTER_ROLES) for target in targets)


def blocks_of(model_type: str, tensors: Collection[str]) -> dict[int, str]:
    """{layer: the name of its module}, in order, from the names of all tensors. Errors as for `matrices_of`."""
    if model_type not in ARCHITECTURES:
        matrices_of(model_type, {})  # raises, naming the families
    prefix = _prefix(ARCHITECTURES[model_type].layers, tensors)
    layers = sorted({int(name[len(prefix) :].split(".")[0]) for name in tensors if name.startswith(prefix)})
    return {layer: f"{prefix}{layer}" for layer in layers}


def _prefix(layers: str, tensors: Collection[str]) -> str:
    """The prefix of the names of a layer's tensors; models with a head have one more component, such as `bert.`. Raises
    InputError if there are no layers."""
    heads = {name[: name.index(f"{layers}.")] for name in tensors if f"{layers}." in name}
    bare = layers.partition(".")[2] + "."
    if not heads and any(name.startswith(bare) for name in tensors):
        return bare
    if not heads:
        raise InputError(f"the model has no {layers}: its tensors do not match its config")
    return min(heads, key=len) + f"{layers}."


def select(matrices: list[Matrix], targets: list[str]) -> list[Matrix]:
    """The matrices named by `targets` (keys of `TARGETS`, or roles). Raises InputError if a target names none."""
    for target in targets:
        if not any(m.role in TARGETS.get(target, (target,)) for m in matrices):
            have = ", ".join(sorted({m.role for m in matrices}))
            raise InputError(f"target {target!r} names no matrix of this model (it has {have})")
    roles = {role for target in targets for role in TARGETS.get(target, (target,))}
    return [m for m in matrices if m.role in roles]


def named_by(role: str, targets: Iterable[str]) -> str | None:
    """The first of `targets` that names a role, or None."""
    return next((target for target in targets if role in TARGETS.get(target, (target,))), None)


def disjoint(targets: Iterable[str]) -> None:
    """Raise ValueError if two targets name the same role. `embeddings` and `head` may: if a model has one matrix for both, it is
    that of the first of them."""
    named: dict[str, str] = {}
    for target in targets:
        for role in TARGETS.get(target, (target,)):
            if role in named and role != "tied":
                raise ValueError(f"{role} is named by both {named[role]!r} and {target!r}")
            named[role] = target


def ffn_groups(matrices: list[Matrix]) -> list[list[Matrix]]:
    """The matrices of each layer's or expert's FFN: [gate, up, down]; [gate_up, down] if those are one matrix; [up, down] without
    a gate."""
    found: dict[tuple[int, int | None], list[Matrix]] = {}
    for m in matrices:
        if m.role in FFN_ROLES:
            found.setdefault((m.layer, m.expert), []).append(m)
    return [sorted(group, key=lambda m: FFN_ROLES.index(m.role)) for group in found.values()]


def group_name(group: list[Matrix]) -> str:
    """The name of a group in files: layer and roles, and the last layer if it spans several layers."""
    layers = sorted({m.layer for m in group})
    span = f"{layers[0]:03d}" if len(layers) == 1 else f"{layers[0]:03d}-{layers[-1]:03d}"
    own = [] if group[0].expert is None else [f"expert{group[0].expert:03d}"]
    return ".".join([span, *own, *dict.fromkeys(m.role for m in group)])


def moments_file(layer: int) -> str:
    """The name of the file with the statistics of a layer."""
    return f"layer-{layer:03d}.safetensors"


def reads(matrix: Matrix, statistic: str) -> bool:
    """Whether the matrix's site has the statistic: `cross`, the moment with the FFN's input, exists only for hidden units."""
    return statistic != "cross" or matrix.site.endswith("ffn_hidden")


def tokens_of(x: Tensor, length: int) -> Tensor:
    """Activations of a module reshaped to (windows, length, n); some models flatten the leading axes (OPT in its FFN)."""
    return x.reshape(-1, length, x.shape[-1])
