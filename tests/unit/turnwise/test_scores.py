"""The scores and gains of one rollout, checked against the golden numbers and by hand."""

from math import log
from typing import Any

import pytest

from turnwise.errors import InvalidInput
from turnwise.scores import alias_score, answer_score, turn_gains

R1_LOGPROBS = [[-2.0, -1.0, -3.0], [-1.5, -0.5, -1.0], [-0.2, -0.1, -0.3]]
R2_LOGPROBS = [[-2.0, -1.0, -3.0], [-2.4, -1.2, -2.7], [-1.0, -1.4, -2.1]]
SCORES: list[list[float | None]] = [[-2.0, -1.0, -0.2], [-2.0, -2.1, -1.5]]


def about(*numbers: float) -> Any:
    return pytest.approx(list(numbers), abs=1.01e-6)


def test_a_score_is_the_mean_log_prob_of_the_answer() -> None:
    assert [answer_score(tokens) for tokens in R1_LOGPROBS] == about(-2.0, -1.0, -0.2)
    assert [answer_score(tokens) for tokens in R2_LOGPROBS] == about(-2.0, -2.1, -1.5)


def test_gains_of_the_golden_rollouts() -> None:
    assert turn_gains(SCORES[0]) == about(1.0, 0.8)
    assert turn_gains(SCORES[1]) == about(-0.1, 0.6)
    assert turn_gains(SCORES[0], "prob") == about(0.232544, 0.450851)
    assert turn_gains(SCORES[1], "prob") == about(-0.012879, 0.100674)


def test_a_missing_score_takes_both_its_gains() -> None:
    assert turn_gains([-4.0, None, -3.0, -1.0]) == [None, None, 2.0]


def test_aliases() -> None:
    scores = [log(0.1), log(0.5), log(0.3)]

    assert alias_score(scores, "first") == log(0.1)
    assert alias_score(scores, "max") == log(0.5)
    assert alias_score(scores, "mean") == pytest.approx(log(0.015) / 3)
    assert alias_score(scores, "logsumexp") == pytest.approx(log(0.3))
    assert alias_score([0.0, 0.0], "logsumexp") == 0.0
    assert alias_score([-1e6, -900.0], "logsumexp") == pytest.approx(-900.0 + log(0.5))


def test_no_numbers_are_no_score_and_no_gains() -> None:
    with pytest.raises(InvalidInput, match="token_logprobs: is empty"):
        answer_score([])
    with pytest.raises(InvalidInput, match="scores: is empty"):
        alias_score([], "first")
    with pytest.raises(InvalidInput, match="scores: is empty"):
        turn_gains([])


def test_an_unknown_rule_or_kind_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"rule: .*nearest is 'max'"):
        alias_score([-1.0], "maximum")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match=r"kind: .*nearest is 'prob'"):
        turn_gains([-1.0], "probs")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad", [0.1, 2e-6, -1.1e6, float("nan"), float("inf"), -float("inf"), "-1"]
)
def test_a_score_that_is_none_is_refused_in_its_place(bad: Any) -> None:
    scores = [-1.0, -1.0, bad]

    with pytest.raises(InvalidInput, match=r"^scores\[2\]"):
        turn_gains(scores)
    with pytest.raises(InvalidInput, match=r"^scores\[2\]"):
        alias_score(scores, "max")
    with pytest.raises(InvalidInput, match=r"^token_logprobs\[2\]"):
        answer_score(scores)
