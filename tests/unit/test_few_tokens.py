"""Few calibration tokens: what is said of them, and what other text holds along the directions that they show."""

import pytest
import torch

from tests.conftest import ROOT
from tests.unit.test_plan import plan_of
from winnow.calibration.few_tokens import few_tokens, planned
from winnow.factors.shrinkage import eigenvalues, expected, expected_jointly
from winnow.models.shape import shape_of

DEMO = ROOT / "resources" / "models" / "demo"
HIDDEN = (
    "ffn_hidden: 2,048 calibration tokens for 2,048 channels, whose second moment is a rough estimate: fits lose more on "
    "other text than on this; use 16 windows instead of 1 (16 tokens per channel)"
)


def test_the_sentence_says_where_how_few_and_what_would_do():
    assert few_tokens([("ffn_hidden", 2048, 2048)] * 18, 1) == [HIDDEN]
    (line,) = few_tokens([("attention_input", 640, 600), ("ffn_input", 640, 600)], 2)
    assert line.startswith("attention_input, ffn_input: 600 calibration tokens for 640 channels, whose second moment cannot have")
    assert "; use 35 windows instead of 2 " in line
    assert few_tokens([("ffn_input", 64, 1024)], 4) == []
    (line,) = few_tokens([("ffn_input", 64, 1023)], 4)
    assert "; use 5 windows instead of 4 " in line
    experts = [(f"expert{i:03d}.ffn_input", 8, tokens) for i, tokens in enumerate((1000, 100, 0))]
    (line,) = few_tokens(experts, 4)
    assert line.startswith("ffn_input of 2 of 3 experts: 0 calibration tokens for 8 channels")


def test_a_plan_says_it_of_every_calibration():
    def change(c):
        c["calibrations"]["demo"].update(windows=4, length=88, first_token=False)
        c["calibrations"]["ample"] = {"text": "demo_calibration", "windows": 22, "length": 256}
        c["experiments"]["demo"].update(calibrations=["demo", "ample"], methods=["svd", "whitened"])

    lines = planned(plan_of(change), {"demo": shape_of(DEMO)})
    assert [line.partition(", whose")[0] for line in lines] == [
        "demo, calibration demo: attention_input, attention_output, ffn_input: 348 calibration tokens for 128 channels",
        "demo, calibration demo: ffn_hidden: 348 calibration tokens for 352 channels",
    ]
    assert "; use 65 windows instead of 4 " in lines[1]

    def weights_only(c):
        change(c)
        c["experiments"]["demo"].update(methods=["svd"])

    assert planned(plan_of(weights_only), {"demo": shape_of(DEMO)}) == []


def drawn(n: int, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(C, the second moment of so many tokens of covariance C): eigenvalues from 1 to a thousandth, in any directions."""
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    root = basis * torch.logspace(0, -1.5, n, dtype=torch.float64)
    x = torch.randn(tokens, n, generator=generator, dtype=torch.float64) @ root.T
    return root @ root.T, x.T @ x / tokens


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0, 8.0])
def test_directions_are_taken_to_hold_what_they_hold(ratio, generator):
    """Of independent tokens, all of which count: the quarter of the directions that the tokens show least hold on other text what
    is expected, and that is more than they hold of these tokens."""
    n = 120
    true, seen = drawn(n, int(ratio * n), generator)
    values, vectors = torch.linalg.eigh(seen)
    found, holds = eigenvalues(values, int(ratio * n), 1.0), ((vectors.T @ true) * vectors.T).sum(1)
    assert float(found.sum()) == pytest.approx(float(values.sum()))
    for part in (slice(0, n // 4), slice(n // 4, n // 2), slice(n // 2, n)):
        assert float(found[part].sum()) == pytest.approx(float(holds[part].sum()), rel=0.3)
    assert float(values[: n // 4].sum()) < 0.8 * float(holds[: n // 4].sum())


def test_what_is_enough_and_what_never_fires_stay_as_they_are(generator):
    _, seen = drawn(20, 320, generator)
    assert expected(seen, 320) is seen
    seen[3], seen[:, 3] = 0, 0
    found = expected(seen, 40)
    assert torch.equal(found[3], torch.zeros(20, dtype=torch.float64))
    assert float(found.trace()) == pytest.approx(float(seen.trace()))
    assert torch.allclose(found, found.T)
    for whole in (torch.zeros(4, 4), torch.full((4, 4), float("inf"))):
        assert expected(whole, 1) is whole
    # a direction that no token shows, of more tokens than channels, is none: layer norm takes one away
    flat = torch.eye(20, dtype=torch.float64) - 1 / 20
    _, seen = drawn(20, 60, generator)
    ones = torch.ones(20, dtype=torch.float64)
    assert float(ones @ expected(flat @ seen @ flat, 60) @ ones) == pytest.approx(0, abs=1e-12)


def test_inputs_that_never_change_are_taken_as_they_are(generator):
    x = torch.randn(6, generator=generator, dtype=torch.float64)
    h = torch.randn(4, generator=generator, dtype=torch.float64)
    sites = {"gram": torch.outer(x, x), "mean": x}, {"gram": torch.outer(h, h), "mean": h, "cross": torch.outer(h, x)}
    for tokens in (1, 8, 40):
        for before, after in zip(sites, expected_jointly(*sites, tokens), strict=True):
            assert all(torch.allclose(before[key], after[key]) for key in before)
    assert expected_jointly(*sites, 96) == sites, "16 tokens per channel of the wider one"


def test_a_map_from_input_to_hidden_units_is_judged_by_both_together(generator):
    """The error of the least-squares map of 60 inputs to 30 outputs, half of whose energy it cannot know, over 90 tokens."""
    x = torch.randn(90, 60, generator=generator, dtype=torch.float64)
    weight = torch.randn(60, 30, generator=generator, dtype=torch.float64) / 60**0.5
    h = x @ weight + torch.randn(90, 30, generator=generator, dtype=torch.float64)
    sites = [{"gram": a.T @ a / 90, "mean": torch.zeros(a.shape[1], dtype=torch.float64)} for a in (x, h)]
    sites[1]["cross"] = h.T @ x / 90
    maps = torch.linalg.solve(sites[0]["gram"], sites[1]["cross"].T).T

    def error(x, h):
        return float((h["gram"] - 2 * maps @ h["cross"].T + maps @ x["gram"] @ maps.T).trace())

    true = 30 + float((maps - weight.T).square().sum())
    assert error(*sites) < 0.2 * true
    assert error(*expected_jointly(*sites, 90, 1.0)) == pytest.approx(true, rel=0.35)
