"""Whether a checkpoint that loses less than the dense model does so by a part of first order, which no predicted loss can see.

    python -m tests.benchmarks.first_order MODEL CHECKPOINT TOKENS [TOKENS ...] [--windows 64]

MODEL is a dense model's folder, CHECKPOINT a compressed one's, TOKENS files of windows that the workflow made (a calibration's or
an evaluation's). Every block gives (1 - t) of the dense block's output and t of the compressed one's. Printed is the loss above
the dense model's in nats per token, with its standard error over windows, for several t, and as a share of t: where that is the
same for all t the change is of first order, where it grows with t of second, as a predicted loss is.
"""

import argparse
from pathlib import Path
from statistics import fmean, stdev

import torch

from winnow.checkpoint.loading import load_model
from winnow.evaluation.perplexity import evaluate
from winnow.io.artifacts import read_tensors
from winnow.models.architectures import blocks_of

SHARES = (0.05, 0.25, 0.5, 1.0)


def blended(model, other, names: list[str], share: list[float]) -> None:
    """Make every block of `model` give share[0] of the output of its like in `other`, called with the same."""

    def hook_of(block):
        def hook(_module, args, kwargs, output):
            if share[0] == 0:
                return None
            found, own = (o[0] if isinstance(o, tuple) else o for o in (block(*args, **kwargs), output))
            mixed = own + share[0] * (found - own)
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        return hook

    for name in names:
        model.get_submodule(name).register_forward_hook(hook_of(other.get_submodule(name)), with_kwargs=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("tokens", type=Path, nargs="+")
    parser.add_argument("--windows", type=int, default=64)
    given = parser.parse_args()
    dense, other = (load_model(path, "float32", "cpu") for path in (given.model, given.checkpoint))
    shapes = {name: {"shape": list(t.shape), "dtype": "F32"} for name, t in dense.state_dict().items()}
    share = [0.0]
    blended(dense, other, list(blocks_of(dense.config.model_type, shapes).values()), share)
    for path in given.tokens:
        tensors = read_tensors(path, sealed=True)[0]
        ids = tensors["ids"][: given.windows]
        first = tensors.get("first", torch.ones(len(tensors["ids"]), dtype=torch.int64))[: given.windows]
        losses = {}
        for share[0] in (0.0, *SHARES):
            rows = evaluate(dense, None, ids, first, 8)
            losses[share[0]] = [nll / count for nll, count in zip(rows["nll"], rows["tokens"], strict=True)]
        print(f"\n{path}, {len(ids)} windows\n\n| t | nats above dense | the same / t |\n|---:|---:|---:|")
        for t in SHARES:
            apart = [a - b for a, b in zip(losses[t], losses[0.0], strict=True)]
            print(f"| {t} | {fmean(apart):.5f} ± {stdev(apart) / len(apart) ** 0.5:.5f} | {fmean(apart) / t:.5f} |", flush=True)


if __name__ == "__main__":
    main()
