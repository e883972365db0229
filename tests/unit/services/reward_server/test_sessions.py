"""Scoring sessions over the fake engine, by hand-worked numbers."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.reward_server.errors import (
    DeadlinePassed,
    InvalidRequest,
    Overloaded,
)
from tests.reward_stand import INVALID, OK, Stand, publish_version
from turnwise.v1 import reward_pb2 as pb


def open_step(*ids: int, answer: int = 5) -> pb.ScoreSessionRequest:
    opened = pb.SessionOpen(rollout_id="s", token_ids=ids, answers=[pb.Answer(token_ids=[answer])])
    return pb.ScoreSessionRequest(open=opened)


def extend(*ids: int, policy: tuple[int, int] | None = None) -> pb.ScoreSessionRequest:
    spans = [pb.TokenSpan(start=policy[0], end=policy[1])] if policy else []
    return pb.ScoreSessionRequest(extend=pb.SessionExtend(token_ids=ids, policy_spans=spans))


CLOSE = pb.ScoreSessionRequest(close=pb.SessionClose())


async def session(stand: Stand, *steps: pb.ScoreSessionRequest) -> list[pb.ScoreSessionResponse]:
    async def requests() -> AsyncIterator[pb.ScoreSessionRequest]:
        for step in steps:
            yield step

    return [reply async for reply in stand.handlers.score_session(requests())]


async def test_a_session_scores_each_turn_and_closes_with_all() -> None:
    opened, extended, closed = await session(Stand(), open_step(1), extend(2, 4), CLOSE)

    assert [p.score for p in opened.score.prefixes] == [-0.7]
    assert not opened.score.gains
    assert (opened.provisional, opened.first_prefix) == (True, 0)
    assert [p.score for p in extended.score.prefixes] == [-0.3]
    assert list(extended.score.gains) == pytest.approx([0.4])
    assert (extended.provisional, extended.first_prefix) == (True, 1)
    assert [p.score for p in closed.score.prefixes] == [-0.7, -0.3]
    assert list(closed.score.gains) == pytest.approx([0.4])
    assert not closed.provisional
    assert closed.score.usage.tokens_computed == 1 + 3  # the fake engine caches nothing


async def test_a_new_version_scores_every_prefix_of_a_session_again(tmp_path: Path) -> None:
    stand = Stand(root=tmp_path)

    async def requests() -> AsyncIterator[pb.ScoreSessionRequest]:
        yield open_step(1)
        await stand.handlers.load_policy(publish_version(tmp_path, 2))
        yield extend(2, 4)
        yield CLOSE

    _, extended, closed = [r async for r in stand.handlers.score_session(requests())]

    assert extended.first_prefix == 0
    assert [p.score for p in extended.score.prefixes] == [-0.9, -0.5]
    assert extended.score.policy_version == closed.score.policy_version == 2
    assert [p.score for p in closed.score.prefixes] == [-0.9, -0.5]


async def test_a_refused_step_changes_nothing() -> None:
    replies = await session(
        Stand(max_prefixes=2), open_step(1), extend(100), extend(2, 4), extend(1), CLOSE
    )

    assert [reply.score.status for reply in replies] == [OK, INVALID, OK, INVALID, OK]
    assert replies[1].score.reason == "token_ids[0]: id 100 exceeds the limit vocab_size=100"
    assert replies[3].score.reason == "prefixes: 3 exceed the limit max_prefixes=2"
    assert [p.score for p in replies[4].score.prefixes] == [-0.7, -0.3]


async def test_an_answer_that_the_policy_wrote_in_a_session_is_flagged() -> None:
    steps = open_step(1), extend(2, 5, policy=(0, 1)), extend(5, 2, policy=(0, 1)), CLOSE

    replies = await session(Stand(), *steps)

    assert [reply.score.answer_leaked for reply in replies] == [False, False, True, True]


@pytest.mark.parametrize(
    "steps",
    [[extend(1)], [CLOSE], [open_step(1), open_step(1)], [pb.ScoreSessionRequest()]],
)
async def test_steps_in_a_wrong_order_end_the_session(
    steps: list[pb.ScoreSessionRequest],
) -> None:
    with pytest.raises(InvalidRequest, match="expected open, once and first"):
        await session(Stand(), *steps)


async def test_a_silent_session_ends() -> None:
    stand = Stand()

    async def requests() -> AsyncIterator[pb.ScoreSessionRequest]:
        yield open_step(1)
        await asyncio.sleep(60)

    with pytest.raises(DeadlinePassed, match="no step came"):
        [reply async for reply in stand.handlers.score_session(requests())]
    assert stand.value("sessions") == 0


async def test_sessions_have_a_limit() -> None:
    stand = Stand(max_sessions=1)

    async def requests() -> AsyncIterator[pb.ScoreSessionRequest]:
        yield open_step(1)
        with pytest.raises(Overloaded, match="max_sessions=1"):
            await session(stand, open_step(1))
        yield CLOSE

    assert len([reply async for reply in stand.handlers.score_session(requests())]) == 2
