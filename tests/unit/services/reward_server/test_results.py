"""Scores by alias rule, gains, and what is not a score; worked out by hand."""

from math import exp, inf, log, nan

import pytest

from services.reward_server.call import Unscored
from services.reward_server.engines import AnswerIds, JobScore, ScoreJob, Usage
from services.reward_server.requests import CheckedRollout, RolloutResult, ScoreOptions
from services.reward_server.results import call_usages, to_result
from tests.scoring import answer

JOB = ScoreJob((1, 2, 3), (1, 3), (answer(7, 8), answer(9)))
LOGPROBS = (((-1.0, -3.0), (-1.0,)), ((-0.5, -0.5), (-2.0,)))  # means: -2 -1, -0.5 -2


def result(
    options: ScoreOptions | None = None,
    job: ScoreJob = JOB,
    logprobs: tuple[tuple[tuple[float, ...], ...], ...] = LOGPROBS,
) -> RolloutResult:
    score = JobScore("OK", "", logprobs)
    rollout = CheckedRollout("r", "g", job)
    return to_result(rollout, score, Usage(9, 5, 2, 3), options or ScoreOptions(), 4, "trie")


def test_the_default_is_the_best_alias_and_the_gain_of_its_log_prob() -> None:
    assert result() == RolloutResult(
        "r",
        "OK",
        scores=(-1.0, -0.5),
        answer_scores=((-2.0, -1.0), (-0.5, -2.0)),
        gains=(0.5,),
        policy_version=4,
        route="trie",
        usage=Usage(9, 5, 2, 3),
    )


@pytest.mark.parametrize(
    ("rule", "scores"),
    [
        ("first", (-2.0, -0.5)),
        ("mean", (-1.5, -1.25)),
        ("logsumexp", (log((exp(-2) + exp(-1)) / 2), log((exp(-0.5) + exp(-2)) / 2))),
    ],
)
def test_the_other_alias_rules(rule: str, scores: tuple[float, ...]) -> None:
    options = ScoreOptions(alias_rule=rule)  # type: ignore[arg-type]

    assert result(options).scores == pytest.approx(scores)


def test_an_alias_given_twice_counts_once() -> None:
    job = ScoreJob((1,), (1,), (answer(7), AnswerIds((7, 5), 0, 1), answer(9)))

    mean = result(ScoreOptions(alias_rule="mean"), job, (((-1.0,), (-1.0,), (-4.0,)),))

    assert mean.scores == (-2.5,)
    assert mean.answer_scores == ((-1.0, -1.0, -4.0),)


def test_a_prob_gain_is_the_rise_in_probability() -> None:
    assert result(ScoreOptions("prob")).gains == pytest.approx((exp(-0.5) - exp(-1.0),))


def test_token_logprobs_come_when_asked_for() -> None:
    assert result().token_logprobs == ()
    assert result(ScoreOptions(token_logprobs=True)).token_logprobs == LOGPROBS


@pytest.mark.parametrize("number", [nan, inf, -inf, 1.1e-6, -1e7])
def test_a_number_that_is_no_score_is_an_error_and_never_a_score(number: float) -> None:
    bad = result(job=JOB, logprobs=(LOGPROBS[0], ((-0.5, number), (-2.0,))))

    reason = f"prefix 1, answer 0: log-prob {number} is not a score"
    assert bad == RolloutResult("r", "ERROR", reason)


def test_rounding_above_zero_is_a_score() -> None:
    assert result(job=ScoreJob((1,), (1,), (answer(7),)), logprobs=(((1e-6,),),)).scores == (1e-6,)


@pytest.mark.parametrize("logprobs", [(), LOGPROBS[:1], (LOGPROBS[0], ((-1.0,), (-1.0,)))])
def test_numbers_that_are_missing_are_an_error(
    logprobs: tuple[tuple[tuple[float, ...], ...], ...],
) -> None:
    bad = result(logprobs=logprobs)

    assert (bad.status, bad.reason) == ("ERROR", "the engine returned log-probs of the wrong shape")


@pytest.mark.parametrize(
    "score", [JobScore("INVALID", "too long"), Unscored("DEADLINE", "too late")]
)
def test_what_was_not_scored_keeps_status_and_reason(score: JobScore | Unscored) -> None:
    rollout = CheckedRollout("r", "g", JOB)

    done = to_result(rollout, score, Usage(), ScoreOptions(), 4, "trie")

    assert done == RolloutResult("r", score.status, score.reason)


def test_usage_is_told_as_if_the_call_had_been_alone() -> None:
    # The call's trie has 100 + 20 positions. In the batch, another call brought the first 60.
    batch = [Usage(100, 40, 0, 40), Usage(110, 20, 0, 20)]

    assert call_usages([100, 20], batch) == [Usage(100, 100, 60, 40), Usage(110, 20, 0, 20)]


def test_what_a_job_computed_for_another_of_its_call_is_not_cached() -> None:
    # The engine computed the shared 90 at the second job; the call's trie counts it at the first.
    batch = [Usage(100, 10, 90, 10), Usage(110, 110, 0, 110)]

    assert call_usages([100, 20], batch) == [Usage(100, 100, 0, 10), Usage(110, 20, 0, 110)]
