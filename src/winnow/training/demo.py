"""The demo: documents from the Python installation, and a small Llama-style model trained on them.

It is not used by the compression stages; it builds `resources/texts/demo` and `resources/models/demo`, and is kept so that
anybody can rebuild both.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import math
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from winnow.io import specs

log = logging.getLogger(__name__)

SKIPPED = {"test", "tests", "site-packages", "idlelib", "lib2to3", "ensurepip", "turtledemo", "__pycache__"}
PARTS = {"evaluation": 9, "calibration": 9}  # per cent of the groups; the rest is training text
SHARED_PARAGRAPH = 80  # characters: documents with such a paragraph in common go to the same part
END_OF_TEXT = "<|endoftext|>"


def collect_documents() -> dict[str, str]:
    """Language-reference topics and docstrings of the standard library: {document name: text}.

    A document is one topic of `pydoc_data`, or all docstrings of one top-level module or package. Only the first of several equal
    docstrings is kept, so that no text can be in two parts of the split.
    """
    from pydoc_data.topics import topics

    documents = {f"topic/{name}": text for name, text in topics.items()}
    seen: set[str] = set()
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if SKIPPED & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError) as error:  # a few library files are invalid on purpose
            log.info("skipped %s: %s", path.name, error)
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 40 and text not in seen:
                    seen.add(text)
                    name = f"module/{parts[0].lstrip('_')}"
                    documents[name] = documents.get(name, "") + text + "\n\n"
    return documents


def group_documents(documents: dict[str, str]) -> dict[str, str]:
    """{document name: name of its group}; documents that share a long paragraph are in one group.

    Some topics contain others (`compound` contains `for`, `if`, ...), so splitting by document alone would leak.
    """
    group = {name: name for name in documents}

    def root(name: str) -> str:
        while group[name] != name:
            name = group[name]
        return name

    owner: dict[str, str] = {}
    for name in sorted(documents):
        for paragraph in documents[name].split("\n\n"):
            key = " ".join(paragraph.split())
            if len(key) >= SHARED_PARAGRAPH:
                one, other = sorted((root(owner.setdefault(key, name)), root(name)))
                group[other] = one
    return {name: root(name) for name in documents}


def split_documents(documents: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """Split groups of documents into training, calibration and evaluation rows, by the digest of the group's name."""
    rows: dict[str, list[dict[str, str]]] = {"train": [], "calibration": [], "evaluation": []}
    groups = group_documents(documents)
    for name in sorted(documents):
        draw = int(hashlib.sha256(groups[name].encode()).hexdigest(), 16) % 100
        part = "train"
        for candidate, share in PARTS.items():
            if 0 <= draw < share:
                part = candidate
            draw -= share
        rows[part].append({"name": name, "text": documents[name].strip()})
    return rows


def read_demo_rows(path: Path) -> list[str]:
    """The texts of a file of rows written by `split_documents`."""
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def train_tokenizer(texts: list[str], vocab_size: int):
    """Byte-level BPE of `vocab_size` pieces, trained on the training documents only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=512)


def token_stream(tokenizer, texts: list[str]) -> np.ndarray:
    """All documents as one array of token ids, separated by end-of-text tokens."""
    stream: list[int] = []
    for text in texts:
        stream += tokenizer(text, add_special_tokens=False).input_ids
        stream.append(tokenizer.eos_token_id)
    return np.array(stream, dtype=np.int64)


def unigram_nll(train: np.ndarray, heldout: np.ndarray, vocab_size: int) -> float:
    """Nats per token of the unigram model with add-one smoothing, the loss without context."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[heldout].mean())


@dataclass(frozen=True)
class Training:
    """Steps of `batch` windows of `length` tokens; peak learning rate; decoupled weight decay."""

    steps: int
    batch: int
    length: int
    rate: float
    decay: float
    seed: int


def train_model(stream: np.ndarray, tokenizer, shape: dict, training: Training):
    """Train a Llama-style model of `shape` on random windows of `stream`; returns the model in float32.

    AdamW (betas 0.9, 0.95), linear warm-up over 5 % of the steps, then cosine decay to a tenth of the peak rate.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    steps, length = training.steps, training.length
    torch.manual_seed(training.seed)
    end = tokenizer.eos_token_id
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=len(tokenizer), bos_token_id=end, eos_token_id=end))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": training.decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=training.rate, betas=(0.9, 0.95))
    warm = max(1, steps // 20)

    def schedule(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    generator = np.random.default_rng(training.seed)
    for step in range(steps):
        starts = generator.integers(0, len(stream) - length, size=training.batch)
        ids = torch.from_numpy(np.stack([stream[s : s + length] for s in starts]))
        loss = model(input_ids=ids, labels=ids).loss
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the training loss is {loss.item()} at step {step}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        if step % 50 == 0 or step == steps - 1:
            log.info("step %d of %d: loss %.3f nats per token", step + 1, steps, loss.item())
    return model.eval()


@torch.no_grad()
def heldout_nll(model, stream: np.ndarray, length: int) -> tuple[float, int]:
    """(nats per token, tokens scored) over the non-overlapping windows of `stream`."""
    total, scored = 0.0, 0
    for start in range(0, len(stream) - length + 1, length):
        ids = torch.from_numpy(stream[start : start + length])[None]
        logits = model(input_ids=ids).logits[0, :-1].double()
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        scored += length - 1
    return total / scored, scored


def model_card(facts: dict) -> str:
    """README of the demo model; all numbers are from `facts` (also written as training.json)."""
    recipe = "{steps} of {batch} x {length} tokens, AdamW, peak rate {rate}, weight decay {decay}".format(**facts)
    corpus = f"Python {facts['python']}: `pydoc_data` topics and standard-library docstrings, cut by document"
    return f"""# The demo model

A small causal language model of the Llama family (SwiGLU, grouped-query attention), trained from scratch by this
project with `snakemake demo_model`. It exists so that the whole workflow runs offline on a trained model, and has no
other use.

| what | value |
|---|---|
| corpus | {corpus} (`resources/texts/demo`) |
| training tokens, distinct / seen | {facts["train_tokens"]:,} / {facts["tokens_seen"]:,} |
| steps | {recipe} |
| parameters | {facts["parameters"]:,} |
| vocabulary size | {facts["vocab_size"]:,} |
| perplexity on the evaluation part | {facts["perplexity"]:.2f} ({facts["nll"]:.4f} nats per token, {facts["scored"]:,} tokens) |
| perplexity on as many tokens of the training part | {facts["train_perplexity"]:.2f} |
| unigram perplexity on the evaluation part | {facts["unigram_perplexity"]:.2f} |
| weights stored as | {facts["stored_dtype"]} |

The evaluation perplexity is over non-overlapping windows of {facts["length"]} tokens, weights as stored, computed in float32.
The text comes from Python and its documentation: Copyright (c) 2001-2023 Python Software Foundation, PSF License
(`resources/texts/demo/LICENSE`).
"""


def build(folder: Path, train: str, evaluation: str, spec: specs.Demo) -> None:
    """Train on the rows of `train`, store in float16, measure the stored model, write model, tokenizer and card."""
    import platform

    texts = {"train": read_demo_rows(Path(train)), "evaluation": read_demo_rows(Path(evaluation))}
    tokenizer = train_tokenizer(texts["train"], spec["vocab_size"])
    streams = {part: token_stream(tokenizer, rows) for part, rows in texts.items()}
    training = Training(**spec["training"])
    model = train_model(streams["train"], tokenizer, spec["shape"], training)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    nll, scored = heldout_nll(model.float(), streams["evaluation"], training.length)
    train_nll, _ = heldout_nll(model, streams["train"][: len(streams["evaluation"])], training.length)
    facts = {
        **asdict(training),
        "python": platform.python_version(),
        "train_tokens": len(streams["train"]),
        "tokens_seen": training.steps * training.batch * training.length,
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocab_size": len(tokenizer),
        "nll": nll,
        "scored": scored,
        "perplexity": math.exp(nll),
        "train_perplexity": math.exp(train_nll),
        "unigram_perplexity": math.exp(unigram_nll(streams["train"], streams["evaluation"], len(tokenizer))),
        "stored_dtype": "float16",
    }
    (folder / "training.json").write_text(json.dumps({**spec, **facts}, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(facts), encoding="utf-8")
