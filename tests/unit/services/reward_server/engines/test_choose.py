"""Drawn tokens follow the distribution that their parameters ask for: chi-square, fixed seeds."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from services.reward_server.engines import SampleParams
from services.reward_server.engines.choose import draw
from tests.scoring import sample
from tests.tiny_models import plain_model
from tests.unit.services.reward_server.engines.conftest import SaveModel, StartEngine

Floats = NDArray[np.float64]

PROMPT = (3, 2, 0)  # after it the untied model spreads over many tokens
DRAWS = 5000
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 4},
    {"top_p": 0.8},
    {"top_k": 8, "top_p": 0.6, "temperature": 1.5},
]


def filtered(
    logits: Floats, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Floats:
    """The distribution asked for: top_k most likely tokens, then the least set holding top_p."""
    scaled: Floats = np.exp((logits - logits.max()) / temperature)
    probs: Floats = scaled / scaled.sum()
    order = np.argsort(-probs, kind="stable")
    kept = order[: top_k or len(order)]
    within = np.cumsum(probs[kept]) / probs[kept].sum()
    kept = kept[: int(np.searchsorted(within, top_p - 1e-9)) + 1]
    result: Floats = np.zeros_like(probs)
    result[kept] = probs[kept] / probs[kept].sum()
    return result


def check_drawn(tokens: Sequence[int], expected: Floats) -> None:
    """Chi-square over the tokens expected at least five times, the rest thrown together."""
    counts = np.bincount(tokens, minlength=len(expected)).astype(float)
    assert counts[expected == 0].sum() == 0, "a token that was filtered out"
    mean = expected * len(tokens)
    common = mean >= 5
    observed = np.append(counts[common], counts[~common].sum())
    hoped = np.append(mean[common], mean[~common].sum())
    observed, hoped = observed[hoped > 0], hoped[hoped > 0]
    statistic = float(((observed - hoped) ** 2 / hoped).sum())
    freedom = len(hoped) - 1
    assert freedom >= 3
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5, "less likely than one in thousands"


def test_the_reference_filter_by_hand() -> None:
    logits = np.log([0.5, 0.1, 0.3, 0.1])
    assert filtered(logits, top_k=2) == pytest.approx([0.625, 0, 0.375, 0])
    assert filtered(logits, top_p=0.8) == pytest.approx([0.625, 0, 0.375, 0])
    assert filtered(logits, top_p=0.81)[[1, 3]].max() == pytest.approx(1 / 9)
    assert filtered(logits, temperature=0.5)[0] == pytest.approx(25 / 36)


@pytest.mark.parametrize("asked", [FILTERS[0], FILTERS[4], FILTERS[5]], ids=str)
async def test_sampled_tokens_follow_the_distribution_asked_for(
    saved: SaveModel, start: StartEngine, asked: dict[str, Any]
) -> None:
    path = saved(vocab=31, tied=False)
    with torch.no_grad():
        logits = plain_model(path)(torch.tensor([PROMPT])).logits[0, -1].double().numpy()
    sampled = await sample(start(path), PROMPT, max_tokens=1, seed=1, n=DRAWS, **asked)

    check_drawn([ids[0] for ids in sampled.ids], filtered(logits, **asked))


@pytest.mark.parametrize("asked", FILTERS, ids=str)
def test_a_flat_distribution_too(asked: dict[str, Any]) -> None:
    logits = np.random.default_rng(5).normal(size=40)
    rows = [(SampleParams(1, **asked), random.Random(i)) for i in range(DRAWS)]
    drawn = draw(torch.tensor(logits, dtype=torch.float32).repeat(len(rows), 1), rows)

    check_drawn(drawn.tolist(), filtered(logits, **asked))


class Always(random.Random):
    """A stream that gives one number for ever."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def random(self) -> float:
        return self.number


def test_a_number_picks_the_token_whose_share_of_the_line_it_lies_in() -> None:
    logits_RV = torch.tensor([[-1.0, 2.0, 2.0, -2.0]] * 5)
    params = SampleParams(1, top_k=2)  # shares 0, 1/2, 1/2, 0
    numbers = [0.0, 0.25, 0.5, 0.75, 1 - 2**-53]

    drawn = draw(logits_RV, [(params, Always(number)) for number in numbers])
    assert drawn.tolist() == [1, 1, 2, 2, 2]


def test_greedy_and_sampled_rows_do_not_mix() -> None:
    logits_RV = torch.tensor([[0.0, 5.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]] * 500)
    greedy, free = SampleParams(1, temperature=0), SampleParams(1)
    rows = [(greedy if i % 2 == 0 else free, random.Random(i)) for i in range(1000)]
    drawn = draw(logits_RV, rows)

    assert set(drawn[::2].tolist()) == {1}
    check_drawn(drawn[1::2].tolist(), np.full(4, 1 / 4))
