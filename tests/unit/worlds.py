"""Small random layers for the suite of structures: weights, inputs, gradients, and the modules that structures replace."""

from collections.abc import Collection
from unittest.mock import patch

import torch
from torch import nn

from winnow.calibration.clusters import assign, site_of
from winnow.metrics.base import METRICS
from winnow.models.architectures import SITES, Matrix, reads
from winnow.structures.base import STRUCTURES, Problem

ROLES = ("q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Kinds that are fitted themselves; the members of `mixed` are, see test_mixed.py.
FITTED = [kind for kind in STRUCTURES if kind != "mixed"]
# No size of these reproduces the layer.
LOSSY = {"affine_block", "rounded", "rounded_channels", "rounded_low_rank", "rounded_neuron_slice", "rounded_offsets"}
# Options that suit matrices of a few channels.
SMALL = {
    "bypass": {"kept": 2},
    "cluster": {"clusters": 2},
    "rounded": {"bits": [2, 3, 4, 6]},  # 8 change so little that comparisons are of rounding errors
    "rounded_low_rank": {"bits": [4], "ranks": [0.25, 0.5, 0.75, 1.0], "rounding": "nearest"},
    "rounded_neuron_slice": {"bits": [6], "neurons": [0.25, 0.5, 0.75, 1.0], "rounding": "nearest"},
    "rounded_channels": {"bits": [2, 3, 4, 6], "group": 5},
    "rounded_offsets": {"bits": [2, 3, 4, 6], "group": 5},
    "tiers": {"exact": 1, "columns": [0.5, 0.5], "ranks": [0.6, 0.4]},
}
# Variants of structures that the suite runs beside the default options of every registered one.
VARIANTS = [
    {"kind": "cluster", "clusters": 2, "axis": "rows", "by": "cosine"},
    {"kind": "cluster", "clusters": 3, "axis": "neurons", "by": "random"},
    {"kind": "cluster", "clusters": 2, "axis": "d_model", "by": "norm"},
    {"kind": "cluster", "clusters": 2, "by": "activation"},
    {"kind": "cluster", "clusters": 2, "axis": "neurons", "by": "co_activation"},
    {"kind": "bypass", "kept": 2, "remainder": {"kind": "cluster", "clusters": 2}},
    {"kind": "bypass", "kept_fraction": 0.2, "remainder": {"kind": "shared_basis"}},
    {"kind": "bypass", "kept": 1, "kept_bits": 8, "remainder": {"kind": "rounded", "bits": [2, 3]}, "rounds": 3},
    {"kind": "bypass", "kept": 2, "remainder": {"kind": "rounded", "bits": [2, 4]}, "order": "remainder_first"},
    {"kind": "tiers", "exact": 1, "columns": [0.5, 0.5], "ranks": [0.6, 0.4], "score": "weight_norm"},
    {"kind": "split", "exact": 0.0},
    {"kind": "split", "exact": 0.5, "criterion": "leverage"},
    {"kind": "split", "exact": 1.0, "criterion": "random"},
    {"kind": "split_affine", "light": "dropped", "criterion": "lowest"},
    {"kind": "neuron_slice", "correction": "none", "criterion": "activation_x_row"},
    {"kind": "neuron_slice", "criterion": "random"},
    {"kind": "neuron_slice", "criterion": "output"},
    {"kind": "neuron_slice", "criterion": "loss"},
    {"kind": "rounded", "bits": [3, 5, 7, 8], "scales": "searched"},
    {"kind": "rounded", "bits": [2, 3, 4, 6], "group": 4},
    {"kind": "rounded", "bits": [2, 3, 5, 8], "group": [4, None], "grids": ["full", "asymmetric"], "rounding": "feedback"},
    {"kind": "rounded", "bits": [2, 4], "group": 8, "rotations": ["none", "inputs", "both"], "rounding": "feedback"},
    {"kind": "rounded_low_rank", "gauge": "split", "ranks": [0.3, 0.8], "group": 4, "rounds": 2, "grids": ["asymmetric"]},
    {"kind": "rounded_neuron_slice", "criterion": "loss", "neurons": [0.4, 1.0], "group": 4},
]


def small(kind: str) -> dict:
    return {"kind": kind, **SMALL.get(kind, {})}


class World:
    """Two layers of random matrices; inputs have channels of mixed scale, and hidden units are those of the FFN's input."""

    def __init__(self, metric_kind, width, hidden, seed, tokens=200, bias=True):
        generator = torch.Generator().manual_seed(seed)
        shapes = {"q_proj": (width, width), "k_proj": (max(1, width // 2), width), "o_proj": (width, width)}
        shapes |= dict.fromkeys(("gate_proj", "up_proj"), (hidden, width)) | {"down_proj": (width, hidden)}

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.metric = METRICS.build({"kind": metric_kind}) if metric_kind else None
        self.matrices, self.weights, self.inputs, self.biases, self.gradients = [], {}, {}, {}, {}
        for layer in (0, 1):
            scale = torch.logspace(-1, 1, width, dtype=torch.float64)[:, None]
            for site in ("attention_input", "attention_output", "ffn_input"):
                self.inputs[layer, site] = scale * normal(width, tokens) + normal(width, 1)
            for role in ROLES:
                module = f"layers.{layer}.{role}"
                matrix = Matrix(layer, role, module, SITES[role], shapes[role], False, bias, f"layers.{layer}.act")
                self.matrices.append(matrix)
                self.weights[matrix.name] = normal(*shapes[role]) / shapes[role][1] ** 0.5
                if bias:
                    self.biases[matrix.name] = normal(shapes[role][0])
                self.gradients[matrix.name] = normal(shapes[role][0], tokens) * normal(shapes[role][0], 1)
            model, x = self.dense([layer]), self.inputs[layer, "ffn_input"].T
            with torch.no_grad():
                parts = [model.get_submodule(f"layers.{layer}.{role}")(x) for role in ("gate_proj", "up_proj")]
                self.inputs[layer, "ffn_hidden"] = (nn.functional.silu(parts[0]) * parts[1]).T

    def groups(self, structure) -> list[list[Matrix]]:
        """Those of a structure that hold a matrix of the first layer: the second layer's own are of the same kinds again."""
        return [group for group in structure.groups(self.matrices) if any(m.layer == 0 for m in group)]

    def dense(self, layers: Collection[int] = (0, 1)) -> nn.Module:
        """The modules of some layers as a model has them, `layers.{layer}.{role}` and `.act`."""
        model = nn.Module()
        model.layers = nn.ModuleList([nn.Module(), nn.Module()])
        for layer in sorted({m.layer for m in self.matrices} & {*layers}):
            model.layers[layer].act = nn.SiLU()
            for m in (m for m in self.matrices if m.layer == layer):
                with patch.object(nn.Linear, "reset_parameters", lambda _: None):  # which takes longest, and is written over
                    linear = nn.Linear(m.shape[1], m.shape[0], bias=m.bias, dtype=torch.float64)
                linear.weight.data.copy_(self.weights[m.name])
                if m.bias:
                    linear.bias.data.copy_(self.biases[m.name])
                model.layers[layer].add_module(m.role, linear)
        return model

    def moments(self, layer, site) -> dict:
        x = self.inputs[layer, site]
        gram = x @ x.T / x.shape[1]
        found = {"gram": gram, "mean": x.mean(1), "mean_abs": x.abs().mean(1), "max_abs": x.abs().amax(1)}
        found |= {"rms": gram.diagonal().sqrt(), "active": (x > 0).double().mean(1)}
        if site == "ffn_hidden":
            found["cross"] = x @ self.inputs[layer, "ffn_input"].T / x.shape[1]
        return found

    def problem(self, structure, group) -> Problem:
        """With exactly the statistics that structure and metric ask for."""
        needs = dict.fromkeys((*(self.metric.needs if self.metric else ()), *structure.needs()))
        sites, outputs, labels = {}, {}, {}
        for m in group:
            moments = self.moments(m.layer, m.site)
            sites[m.name] = {need: moments[need] for need in needs if need in moments and reads(m, need)}
            g = self.gradients[m.name]
            x = self.inputs[m.layer, m.site]
            outputs[m.name] = {"gradient_gram": g @ g.T / g.shape[1], "fisher": (g @ x.T).square().sum(1) / g.shape[1]}
            if clustering := structure.clustering():
                where = site_of(clustering, m)
                site = self.moments(m.layer, where) if where else {}
                labels[m.name] = assign(self.weights[m.name], site, clustering, m)[0]
        weights = {m.name: self.weights[m.name] for m in group}
        biases = {m.name: self.biases[m.name] for m in group if m.bias}
        return Problem(group, weights, sites, self.metric, biases=biases, outputs=outputs, labels=labels)

    def ffn(self, model, layer) -> torch.Tensor:
        """(tokens, d): the output of the layer's FFN on its recorded inputs."""
        block = model.layers[layer]
        x = self.inputs[layer, "ffn_input"].T
        with torch.no_grad():
            return block.down_proj(block.act(block.gate_proj(x)) * block.up_proj(x))

    def compressed(self, structure, group, tensors, size) -> tuple[nn.Module, int]:
        """(model with the group's modules replaced and loaded, numbers stored). Shared tensors are in place."""
        parts, model = structure.stored(group, tensors, size), self.dense({m.layer for m in group})
        replaced = {name: part for name, part in parts.items()}
        for name, part in replaced.items():
            parent, _, child = name.rpartition(".")
            module = structure.module(part.layout, model.get_submodule(name))
            setattr(model.get_submodule(parent), child, module.double())
        tied = {k: owner for name, part in parts.items() for k, owner in structure.share(model, name, part.layout).items()}
        state = {f"{module}.{key}": tensor for module, part in parts.items() for key, tensor in part.tensors.items()}
        numbers = sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point())
        indices = sum(tensor.nbytes for tensor in state.values() if not tensor.is_floating_point())
        assert indices == structure.index_bytes(group, size), "bytes of indices by formula are those stored"
        if structure.bias_name is not None:
            state |= {f"{m.module}.{structure.bias_of(m)}": self.biases[m.name] for m in group if m.bias}
        expected = {k for name in parts for k in model.get_submodule(name).state_dict(prefix=f"{name}.")}
        assert expected == set(state) | set(tied), "the module's tensors are those stored"
        model.load_state_dict({**state, **{key: state[owner] for key, owner in tied.items()}}, strict=False)
        return model, numbers


def matrix_of(module: nn.Module, inputs: int) -> torch.Tensor:
    """(out, in): the matrix that a module without activation applies, its bias taken off."""
    with torch.no_grad():
        zero = module(torch.zeros(1, inputs, dtype=torch.float64))
        return (module(torch.eye(inputs, dtype=torch.float64)) - zero).T
