"""Requests from recorded rollouts and plain ids; results that never give a number for a failure."""

from itertools import pairwise

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.client_channels import ClientOptions
from turnwise.endpoints import Call, Outcome, Reach, Reply, Router
from turnwise.errors import DeadlineExceeded, InvalidInput, NotScored, RewardError
from turnwise.rollout import Group, Rollout, Turn, pack_ids, pack_logprobs, pack_mask
from turnwise.score_batches import Part, Size, batches, hard_limits, size_of
from turnwise.score_result import (
    NO_VERSION,
    ScoreResult,
    Usage,
    answer,
    from_group,
    from_ids,
    from_rollout,
    read_score,
    score_options,
    with_scores,
)
from turnwise.score_run import GRACE_S, ScoreRun
from turnwise.v1 import reward_pb2 as pb

TURN = Turn(start=2, end=4, policy_version=0, packed_logprobs=pack_logprobs([-1.0]))
LAST = Turn(start=4, end=5, policy_version=0, packed_logprobs=pack_logprobs([-2.0]))
ROLLOUT = Rollout(
    id="r0",
    packed_ids=pack_ids([10, 11, 12, 13, 14]),
    packed_mask=pack_mask([0, 0, 1, 0, 1]),
    prompt_length=2,
    turns=(TURN, LAST),
    scores=(None, None),
    gains=(None,),
)


def wire(*scores: float, version: int = 3, **fields: object) -> pb.RolloutScore:
    prefixes = [pb.PrefixScore(score=s, answers=[pb.AnswerScore(score=s)]) for s in scores]
    given = {
        "rollout_id": "r0",
        "status": pb.ROLLOUT_STATUS_OK,
        "prefixes": prefixes,
        "gains": [b - a for a, b in pairwise(scores)],
        "policy_version": version,
        "route": "fake",
        "usage": pb.Usage(tokens_total=6, tokens_unique=5, tokens_computed=5),
    }
    return pb.RolloutScore(**(given | fields))  # type: ignore[arg-type]


FAILED = pb.RolloutScore(rollout_id="r1", status=pb.ROLLOUT_STATUS_OVERLOADED, reason="no room")


def test_prefix_k_of_a_recorded_rollout_is_the_prompt_and_the_first_k_turns() -> None:
    request = from_rollout(ROLLOUT, [[7, 8]], group_id="g")

    assert [*request.token_ids] == [10, 11, 12, 13, 14]
    assert [*request.prefix_ends] == [2, 4]
    assert (request.rollout_id, request.group_id) == ("r0", "g")
    assert request.answers == [pb.Answer(token_ids=[7, 8], scored_end=2)]


def test_a_group_gives_its_id_and_answers_to_every_rollout() -> None:
    group = Group(id="g", question="q", answers=("a",), rollouts=(ROLLOUT,))

    assert from_group(group, iter([[7]])) == [from_rollout(ROLLOUT, [[7]], "g")]


def test_arrays_and_lists_of_ids_are_the_same_request() -> None:
    arrays = from_ids(np.array([1, 2, 3], np.uint32), np.array([2]), [np.array([4])])

    assert arrays == from_ids([1, 2, 3], [2], [answer([4])])


def test_a_rollout_without_a_turn_cannot_be_scored() -> None:
    empty = Rollout(
        id="r9",
        packed_ids=pack_ids([1]),
        packed_mask=pack_mask([0]),
        prompt_length=1,
        turns=(),
        scores=(),
        gains=(),
    )
    with pytest.raises(InvalidInput, match="r9: has no turn"):
        from_rollout(empty, [[7]])


def test_options_have_the_names_of_the_credit_maths() -> None:
    options = score_options(gain="prob", alias="logsumexp", scorer="reference")

    assert options.gain_kind == pb.GAIN_KIND_PROB
    assert options.alias_rule == pb.ALIAS_RULE_LOGSUMEXP
    assert options.scorer == pb.SCORER_REFERENCE
    with pytest.raises(InvalidInput, match="alias: unknown name 'maxx'"):
        score_options(alias="maxx")  # type: ignore[arg-type]


def test_a_scored_rollout_gives_read_only_arrays() -> None:
    score = read_score(wire(-0.9, -0.2), prefixes=2)

    assert score.scores.tolist() == [-0.9, -0.2]
    assert score.gains.tolist() == pytest.approx([0.7])
    assert score.answer_scores.tolist() == [[-0.9], [-0.2]]
    assert (score.policy_version, score.usage) == (3, Usage(6, 5, 0, 5))
    with pytest.raises(ValueError, match="read-only"):
        score.scores[0] = 0.0


@pytest.mark.parametrize("name", ["scores", "gains", "answer_scores", "token_logprobs"])
def test_a_failed_rollout_has_no_numbers(name: str) -> None:
    score = read_score(FAILED, prefixes=2)

    assert (score.ok, score.status, score.policy_version) == (False, "OVERLOADED", None)
    with pytest.raises(NotScored, match="rollout 'r1' has no scores: OVERLOADED, no room"):
        getattr(score, name)


def test_in_the_flat_arrays_a_failed_rollout_is_an_empty_segment() -> None:
    wires = [wire(-0.9, -0.2), FAILED, wire(-1.5, version=4)]
    result = ScoreResult(tuple(read_score(w, max(1, len(w.prefixes))) for w in wires))

    assert result.scores.values.tolist() == [-0.9, -0.2, -1.5]
    assert result.scores.offsets.tolist() == [0, 2, 2, 3]
    assert result.gains.offsets.tolist() == [0, 1, 1, 1]
    assert result.scores[1].size == 0
    assert result.ok.tolist() == [True, False, True]
    assert result.policy_versions.tolist() == [3, NO_VERSION, 4]
    assert result.usage == Usage(12, 10, 0, 10)
    with pytest.raises(NotScored, match="r1"):
        result.require_ok()


def test_a_result_without_rollouts_is_empty() -> None:
    result = ScoreResult(())

    assert (len(result), result.scores.values.size, result.scores.offsets.tolist()) == (0, 0, [0])


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (wire(-0.9), "1 scores for 2 prefixes"),
        (wire(-0.9, -0.2, gains=[]), "0 gains for 2 prefixes"),
        (wire(-0.9, float("nan"), gains=[0.0]), "nan as score 2"),
        (wire(-0.9, 0.5), "0.5 as score 2"),
        (wire(-0.9, -0.2, gains=[float("inf")]), "a gain that is not finite"),
        (wire(-0.9, -0.2, prefixes=[pb.PrefixScore(score=-1.0)] * 2), "scores of [0] answers"),
        (wire(-0.9, -0.2, status=0), "status 0, which is unknown"),
    ],
)
def test_what_is_no_score_is_an_error(reply: pb.RolloutScore, problem: str) -> None:
    score = read_score(reply, prefixes=2)

    assert score.status == "ERROR"
    assert problem in score.reason
    with pytest.raises(NotScored):
        _ = score.scores


def test_scores_go_into_the_recorded_rollout_and_so_does_a_failure() -> None:
    scored = with_scores(ROLLOUT, read_score(wire(-0.9, -0.2), 2))
    failed = with_scores(ROLLOUT, read_score(FAILED, 2))

    assert (scored.scores, scored.score_version, scored.route) == ((-0.9, -0.2), 3, "fake")
    assert (failed.scores, failed.status, failed.reason) == ((None, None), "OVERLOADED", "no room")


def test_the_size_of_a_rollout_counts_each_answer_under_each_prefix() -> None:
    rollout = from_ids([1, 2, 3, 4], [2, 3], [[5], answer([6, 7, 8], 1, 2)])

    assert size_of(rollout)[:2] == (1, 4 + 2 * (1 + 2))


def test_no_limit_is_no_limit() -> None:
    assert hard_limits(pb.ServerLimits()) == (float("inf"),) * 3
    limits = pb.ServerLimits(max_rollouts=5, max_queued_tokens=70, max_request_bytes=5000)
    assert hard_limits(limits) == (5, 70, 5000 - 1024)


def test_groups_stay_whole_up_to_the_hard_limit() -> None:
    sizes = [Size(1, 10, 1)] * 9
    parts = [Part("a", (0, 1)), Part("b", (2, 3, 4, 5, 6)), Part("c", (7,)), Part("d", (8,))]
    soft, hard = Size(3, 100, 100), Size(9, 40, 100)

    packed = [[part.indices for part in batch] for batch in batches(parts, sizes, soft, hard)]

    # b exceeds the soft limit of 3 rollouts, and is cut only at the hard limit of 40 tokens.
    assert packed == [[(0, 1)], [(2, 3, 4, 5)], [(6,), (7,), (8,)]]


sizes_ = st.builds(Size, st.just(1), st.integers(1, 50), st.integers(1, 50))
limits_ = st.builds(Size, st.integers(1, 6), st.integers(1, 120), st.integers(1, 120))


@given(st.lists(st.lists(sizes_, min_size=1, max_size=6), max_size=8), limits_, limits_)
def test_batches_hold_every_rollout_once_in_order_and_within_limits(
    groups: list[list[Size]], first: Size, second: Size
) -> None:
    soft = Size(*(min(a, b) for a, b in zip(first, second, strict=True)))
    sizes = [size for group in groups for size in group]
    starts = np.cumsum([0, *map(len, groups)]).tolist()
    parts = [Part(f"{i}", tuple(range(starts[i], starts[i + 1]))) for i in range(len(groups))]

    packed = list(batches(parts, sizes, soft, second))

    def total(indices: list[int]) -> Size:
        return Size(*(sum(column) for column in zip(*(sizes[i] for i in indices), strict=True)))

    assert [i for batch in packed for part in batch for i in part.indices] == [*range(len(sizes))]
    for batch in packed:
        indices = [i for part in batch for i in part.indices]
        assert len(indices) == 1 or total(indices).fits(second)
        assert len(batch) == 1 or total(indices).fits(soft)
    cut = {part.group for batch in packed for part in batch if len(parts_of(packed, part)) > 1}
    for group in cut:
        whole = [*range(starts[int(group)], starts[int(group) + 1])]
        assert not total(whole).fits(second)


def parts_of(packed: list[list[Part]], part: Part) -> list[Part]:
    return [other for batch in packed for other in batch if other.group == part.group]


class Servers:
    """Servers that fail as drawn, on a clock of their own; rollout i has the score -i - version."""

    def __init__(self, draw: st.DrawFn, limit: int) -> None:
        self.draw, self.version, self.limits = draw, 0, pb.ServerLimits(max_rollouts=limit)

    def reply(self, call: Call) -> Reply:
        fate = self.draw(st.sampled_from(["ok", "ok", "ok", "lost", "full", "bump", "overloaded"]))
        if fate == "lost":
            return Outcome(grpc.StatusCode.UNAVAILABLE, "lost")
        if isinstance(call.request, pb.GetServerInfoRequest):
            return pb.GetServerInfoResponse(limits=self.limits)
        assert len(call.request.rollouts) <= self.limits.max_rollouts
        if fate == "full":
            return Outcome(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", 0.5)
        self.version += fate == "bump"
        scores = [
            wire(-float(rollout.token_ids[0]) - self.version, version=self.version)
            for rollout in call.request.rollouts
        ]
        if fate == "overloaded":
            scores[0] = FAILED
        return pb.ScoreTurnsResponse(scores=scores)


def drive(run: ScoreRun, servers: Servers) -> float:
    """Make the calls of a run, in any order, until it is done; return when."""
    now, flying = 0.0, list[Call]()
    while not run.done:
        flying += run.start(now)
        if flying:
            call = flying.pop(servers.draw(st.integers(0, len(flying) - 1)))
            now += 0.01
            run.finish(call, servers.reply(call), now)
        else:
            now += run.wait_s(now) + 0.001
    return now


@given(st.data(), st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 4))
def test_whatever_fails_the_scores_come_back_in_order_and_a_group_has_one_version(
    data: st.DataObject, groups: list[int], limit: int
) -> None:
    rollouts = [from_ids([i], [1], [[5]], group_id=f"{g}") for i, g in enumerate(groups)]
    servers = Servers(data.draw, limit)  # type: ignore[arg-type]
    run = ScoreRun(Reach(Router(["a", "b"]), 30.0), rollouts, None, ClientOptions(max_calls=3))
    end = drive(run, servers)

    assert end < 30.0 + GRACE_S
    try:
        result = run.result()
    except RewardError:
        return  # no server replied
    assert len(result) == len(rollouts)
    for i, score in enumerate(result):
        if score.ok and score.policy_version is not None:
            assert score.scores.tolist() == [-float(i) - score.policy_version]
        else:
            assert score.reason
    for group in set(groups):
        members = (score for score, g in zip(result, groups, strict=True) if g == group)
        assert len({score.policy_version for score in members if score.ok}) <= 1


def test_a_call_that_never_comes_back_does_not_hold_the_caller() -> None:
    router = Router("a")
    router.endpoints["a"].answered(pb.GetServerInfoResponse())
    run = ScoreRun(Reach(router, 5.0), [from_ids([1], [1], [[5]])], None, ClientOptions())
    assert [call.timeout_s for call in run.start(1.0)] == [4.0]

    run.start(5.5)
    assert not run.done
    run.start(5.1 + GRACE_S)
    assert run.done
    with pytest.raises(DeadlineExceeded):
        run.result()
