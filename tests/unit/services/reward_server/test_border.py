"""The border: each broken rule makes one rollout INVALID and names field and limit."""

import pytest

from services.reward_server.border import check_options, check_rollouts
from services.reward_server.engines import AnswerIds, EngineInfo, ScoreJob
from services.reward_server.errors import InvalidRequest
from services.reward_server.requests import CheckedRollout, Limits, RolloutResult, ScoreOptions
from turnwise.v1 import reward_pb2 as pb

ENGINE = EngineInfo("fake", "fake", "fake", "float32", "cpu", vocab_size=100, max_tokens=20)
LIMITS = Limits(max_rollouts=3, max_prefixes=3, max_answers=2)


def rollout(**changes: object) -> pb.Rollout:
    """Ten tokens, prefixes of 2, 5 and 9, one answer of three tokens of which one is scored."""
    fields: dict[str, object] = {
        "rollout_id": "r",
        "group_id": "g",
        "token_ids": range(10, 20),
        "prefix_ends": [2, 5, 9],
        "answers": [pb.Answer(token_ids=[1, 2, 3], scored_start=1, scored_end=2)],
    }
    return pb.Rollout(**(fields | changes))  # type: ignore[arg-type]


def check(*rollouts: pb.Rollout) -> list[CheckedRollout | RolloutResult]:
    return check_rollouts(pb.ScoreTurnsRequest(rollouts=rollouts), LIMITS, ENGINE)


def test_a_good_rollout_becomes_a_job() -> None:
    job = ScoreJob(tuple(range(10, 20)), (2, 5, 9), (AnswerIds((1, 2, 3), 1, 2),))

    assert check(rollout()) == [CheckedRollout("r", "g", job)]


def test_a_span_that_is_not_set_is_the_whole_answer() -> None:
    (checked,) = check(rollout(answers=[pb.Answer(token_ids=[1, 2, 3])]))

    assert isinstance(checked, CheckedRollout)
    assert checked.job.answers == (AnswerIds((1, 2, 3), 0, 3),)


def answer(start: int, end: int) -> dict[str, object]:
    return {"answers": [pb.Answer(token_ids=[1, 2, 3], scored_start=start, scored_end=end)]}


def spans(*pairs: tuple[int, int]) -> dict[str, object]:
    return {"policy_spans": [pb.TokenSpan(start=start, end=end) for start, end in pairs]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"token_ids": []}, "token_ids: is empty"),
        ({"token_ids": [1] * 9 + [100]}, "token_ids[9]: id 100 exceeds the limit vocab_size=100"),
        ({"prefix_ends": []}, "prefix_ends: is empty"),
        ({"prefix_ends": [0, 3]}, "prefix_ends[0]: must be in 1..10, got 0"),
        ({"prefix_ends": [3, 3]}, "prefix_ends[1]: must be in 4..10, got 3"),
        ({"prefix_ends": [5, 2]}, "prefix_ends[1]: must be in 6..10, got 2"),
        ({"prefix_ends": [2, 11]}, "prefix_ends[1]: must be in 3..10, got 11"),
        ({"prefix_ends": [1, 2, 3, 4]}, "prefix_ends: 4 exceed the limit max_prefixes=3"),
        ({"answers": []}, "answers: is empty"),
        (
            {"answers": [pb.Answer(token_ids=[1])] * 3},
            "answers: 3 exceed the limit max_answers=2",
        ),
        ({"answers": [pb.Answer()]}, "answers[0].token_ids: is empty"),
        (
            {"answers": [pb.Answer(token_ids=[1]), pb.Answer(token_ids=[1, 4_000_000_000])]},
            "answers[1].token_ids[1]: id 4000000000 exceeds the limit vocab_size=100",
        ),
        (answer(2, 2), "answers[0].scored_start and scored_end: [2, 2) is no span of its 3 tokens"),
        (answer(0, 4), "answers[0].scored_start and scored_end: [0, 4) is no span of its 3 tokens"),
        (answer(3, 0), "answers[0].scored_start and scored_end: [3, 3) is no span of its 3 tokens"),
        (spans((3, 3)), "policy_spans[0]: must be a span within 0..10, got [3, 3)"),
        (spans((2, 4), (3, 5)), "policy_spans[1]: must be a span within 4..10, got [3, 5)"),
        (spans((2, 11)), "policy_spans[0]: must be a span within 0..10, got [2, 11)"),
    ],
)
def test_a_broken_rule_is_told_with_field_and_limit(
    changes: dict[str, object], reason: str
) -> None:
    assert check(rollout(**changes)) == [RolloutResult("r", "INVALID", reason)]


def test_the_answer_counts_for_the_longest_sequence_up_to_its_last_scored_token() -> None:
    fits = pb.Answer(token_ids=[1] * 15, scored_end=11)  # 9 + 11 = 20
    too_long = pb.Answer(token_ids=[1] * 12)

    good, bad = check(rollout(answers=[fits]), rollout(answers=[too_long]))

    assert isinstance(good, CheckedRollout)
    reason = "prefix_ends: 21 tokens with the answer exceed the limit max_tokens=20"
    assert bad == RolloutResult("r", "INVALID", reason)


def test_a_bad_rollout_leaves_the_others_alone() -> None:
    kinds = [type(c) for c in check(rollout(), rollout(token_ids=[]), rollout())]

    assert kinds == [CheckedRollout, RolloutResult, CheckedRollout]


@pytest.mark.parametrize(
    ("count", "message"),
    [(0, "rollouts: is empty"), (4, "rollouts: 4 exceed the limit max_rollouts=3")],
)
def test_the_number_of_rollouts_concerns_the_whole_call(count: int, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        check(*[rollout()] * count)


def test_options_that_are_not_set_are_the_defaults_of_the_wire() -> None:
    assert check_options(pb.ScoreOptions()) == ScoreOptions()


def test_every_option_is_read() -> None:
    options = pb.ScoreOptions(
        gain_kind=pb.GAIN_KIND_PROB,
        alias_rule=pb.ALIAS_RULE_LOGSUMEXP,
        scorer=pb.SCORER_REFERENCE,
        token_logprobs=True,
        min_policy_version=7,
    )

    assert check_options(options) == ScoreOptions("prob", "logsumexp", "reference", True, 7)


@pytest.mark.parametrize("field", ["gain_kind", "alias_rule", "scorer"])
def test_a_number_that_names_no_option_is_refused(field: str) -> None:
    with pytest.raises(InvalidRequest, match="99 names no"):
        check_options(pb.ScoreOptions(**{field: 99}))  # type: ignore[arg-type]
