"""Parameter counts of published models, from their configs alone."""

from __future__ import annotations

# (layers, d, hidden, query and key-value width, vocabulary, tied).
PUBLISHED = {
    "Llama-3.1-8B": (32, 4096, 14336, 4096, 1024, 128256, False),
    "SmolLM2-135M": (30, 576, 1536, 576, 192, 49152, True),
}


def counts(name: str) -> dict[str, int]:
    """Parameters of a published model: `ffn`, `blocks` (all its layers, norms included) and `total`."""
    layers, d, hidden, queries, keys, vocabulary, tied = PUBLISHED[name]
    ffn = layers * 3 * d * hidden
    blocks = ffn + layers * (2 * d * queries + 2 * d * keys + 2 * d)
    return {"ffn": ffn, "blocks": blocks, "total": blocks + d + (1 if tied else 2) * vocabulary * d}


def savings(name: str, attention_rank: int, clusters: int, fraction: float) -> tuple[float, float]:
    """(smallest, largest) ratio of the size of the dense blocks to that with attention inputs in a shared basis of some rank and
    the FFN in clusters of the d_model axis, over the ways to count: with or without the basis, factors or dense if smaller."""
    _, d, hidden, queries, keys, *_ = PUBLISHED[name]
    attention, out = d * (queries + 2 * keys), d * queries
    projected = attention_rank * (queries + 2 * keys)
    factors = 3 * int(d / clusters * fraction) * clusters * (hidden + d // clusters)
    dense = attention + out + 3 * d * hidden
    sizes = [a + out + factors for a in (projected, projected + attention_rank * d, attention)]
    return dense / max(sizes), dense / min(sizes)
