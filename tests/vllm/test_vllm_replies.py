"""Reading vLLM's replies: whatever is not exactly the wanted score is an error with a reason."""

from math import inf, nan
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.vllm

FORCED = (7, 8)


def reply(**changes: Any) -> SimpleNamespace:
    """What vLLM returns for the answer 7 8 when all is well, with changes."""
    reported = SimpleNamespace(token_ids=[7, 8], logprobs=[-1.0, -2.5])
    versions = [SimpleNamespace(version="v3", start=0, end=2)]
    sequence = {"finish_reason": "length", "weight_versions": versions, "logprobs": reported}
    return SimpleNamespace(outputs=[SimpleNamespace(**(sequence | changes))])


def flat(token_ids: list[int], logprobs: list[float]) -> SimpleNamespace:
    return SimpleNamespace(token_ids=token_ids, logprobs=logprobs)


def read(output: SimpleNamespace) -> Any:
    from services.reward_server.engines.vllm_scoring import read_reply

    return read_reply("forced_decode", FORCED, output, "v3")


def test_a_good_reply_is_its_log_probs() -> None:
    assert read(reply()) == (-1.0, -2.5)


def test_rounding_may_lift_a_log_prob_a_hair_above_zero() -> None:
    assert read(reply(logprobs=flat([7, 8], [1e-7, 0.0]))) == (1e-7, 0.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"logprobs": flat([7, 8], [-1.0, nan])}, "log-prob of nan"),
        ({"logprobs": flat([7, 8], [-inf, -1.0])}, "log-prob of -inf"),
        ({"logprobs": flat([7, 8], [2e-6, -1.0])}, "log-prob of 2e-06"),
        ({"logprobs": None}, "no log-probs"),
        ({"logprobs": flat([7], [-1.0])}, "other tokens than the answer's 2"),
        ({"logprobs": flat([7, 9], [-1.0, -2.5])}, "other tokens than the answer's 2"),
        ({"finish_reason": "abort"}, "ended the request early: abort"),
        ({"weight_versions": None}, r"used weights \[\], not v3"),
        (
            {"weight_versions": [SimpleNamespace(version=v) for v in ("v2", "v3")]},
            r"used weights \['v2', 'v3'\], not v3",
        ),
    ],
)
def test_any_other_reply_is_a_reason(changes: dict[str, Any], said: str) -> None:
    import re

    assert re.search(said, read(reply(**changes)))
