"""Linear recoverability: three numbers that contradict the paper most, from the dense model and the calibration's tokens."""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.workflow.traces import Trace, tensors


@lru_cache(maxsize=2)
def rows(model: Path, tokens: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """(inputs, outputs) (windows, length, d) of every FFN on the calibration windows."""
    found = transformers.AutoModelForCausalLM.from_pretrained(model.parent, dtype=torch.float32).eval()
    ffns, seen = [layer.mlp for layer in found.model.layers], []
    for ffn in ffns:
        ffn.register_forward_hook(lambda _module, args, output: seen.append((args[0].numpy(), output.numpy())))
    parts: list[list[tuple[np.ndarray, np.ndarray]]] = []
    with torch.no_grad():
        for ids in torch.from_numpy(tensors(tokens)["ids"].astype(np.int64)).split(16):
            seen.clear()
            found.model(input_ids=ids, use_cache=False)
            parts.append(list(seen))
    return [tuple(np.concatenate(sides) for sides in zip(*(p[i] for p in parts), strict=True)) for i in range(len(ffns))]


def blocks(trace: Trace) -> list[tuple[np.ndarray, np.ndarray]]:
    measured = trace.made_by("measure_study")
    (calibration,) = (p for p in trace.parents[measured] if trace.params.get(p, {}).get("kind") == "calibrations")
    return rows(trace.model, trace.folder / calibration)


def flat(part: np.ndarray) -> np.ndarray:
    return part.reshape(-1, part.shape[-1]).astype(np.float64)


def r2(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """R^2 of the affine map, against the grand mean of all outputs and against every output's own."""
    ones = [np.hstack([x, np.ones((len(x), 1))]) for x in (train[0], test[0])]
    fit = np.linalg.lstsq(ones[0], train[1], rcond=None)[0]
    left = np.sum((test[1] - ones[1] @ fit) ** 2)
    return 1 - left / np.sum((test[1] - test[1].mean()) ** 2), 1 - left / np.sum((test[1] - test[1].mean(0)) ** 2)


def held_out(block: tuple[np.ndarray, np.ndarray], fold: int = 4) -> tuple[float, float]:
    """R^2 with one fifth of the windows held out; the last, if none is named."""
    folds = [[flat(part) for part in np.array_split(side, 5)] for side in block]
    train = [np.concatenate([part for i, part in enumerate(side) if i != fold]) for side in folds]
    return r2((train[0], train[1]), (folds[0][fold], folds[1][fold]))


def highest(trace: Trace) -> tuple[float, float]:
    """R^2 of the most linear block: claimed are 0.996."""
    found = blocks(trace)
    value, most = max((held_out(block)[0], i) for i, block in enumerate(found))
    folds = [held_out(found[most], fold)[0] for fold in range(5)]
    return value, np.std(folds, ddof=1) / np.sqrt(5)


def definition(trace: Trace) -> tuple[float, float]:
    """How much R^2 gains where the grand mean stands for every output's own, at most: claimed is nothing."""
    return max(grand - own for grand, own in map(held_out, blocks(trace))), 0.0


def trained(trace: Trace) -> tuple[float, float]:
    """R^2 of the closed form above 3,000 steps of Adam, in the most linear block: claimed are 0.7."""
    found = blocks(trace)
    x, y = max(found, key=lambda block: held_out(block)[0])
    most = max(3, 15_000 // x.shape[1])
    x, y = (side[:most].reshape(-1, side.shape[-1]) for side in (x, y))
    cut = int(0.8 * len(x))
    closed, _ = r2(*(tuple(side[part].astype(np.float64) for side in (x, y)) for part in (slice(cut), slice(cut, None))))
    torch.manual_seed(0)
    affine, inputs, outputs = torch.nn.Linear(x.shape[1], y.shape[1]), torch.from_numpy(x), torch.from_numpy(y)
    optimizer = torch.optim.Adam(affine.parameters(), lr=1e-3)
    for _ in range(3000):
        batch = torch.randint(cut, (256,))
        optimizer.zero_grad()
        (affine(inputs[batch]) - outputs[batch]).square().mean().backward()
        optimizer.step()
    left = (affine.double()(inputs[cut:].double()) - outputs[cut:].double()).square().sum().item()
    return closed - (1 - left / np.sum((y[cut:] - y[cut:].astype(np.float64).mean()) ** 2)), 0.0


ROWS = {"linearity_highest": highest, "linearity_definition": definition, "linearity_trained": trained}
