"""A session scores a rollout as it unfolds, and like a packed call in the end."""

from pathlib import Path

from services.reward_server.engines import JobScore, Usage
from services.reward_server.engines.fake_engine import FakeEngine
from services.reward_server.engines.session import ScoringSession, SessionUpdate
from tests.scoring import SAME_ATOL, answer, check_plain, deviation, rollout
from tests.unit.services.reward_server.engines.conftest import SaveModel, StartEngine

TURNS = [(3, 1, 4, 1), (5, 9), (2,), (6, 5, 3)]
ANSWERS = (answer(8, 7, 6, scored=(1, 3)), answer(9))


async def stream(session: ScoringSession, turns: list[tuple[int, ...]]) -> list[SessionUpdate]:
    return [await session.extend(turn) for turn in turns]


async def test_extending_equals_packed_scoring_and_each_turn_costs_only_its_own_tokens(
    saved: SaveModel, start: StartEngine
) -> None:
    job = rollout(TURNS, *ANSWERS)
    packed = await start(saved()).score([job])
    check_plain(packed, [job], saved())
    session = ScoringSession(start(saved()), ANSWERS)
    updates = await stream(session, TURNS)

    streamed = [update.score.logprobs[0] for update in updates]
    assert deviation(streamed, packed.jobs[0].logprobs) <= SAME_ATOL
    assert [update.first_prefix for update in updates] == [0, 1, 2, 3]
    assert [len(update.score.logprobs) for update in updates] == [1, 1, 1, 1]
    # The answers' inputs 8 7 and none, after the turn's own tokens.
    assert [update.score.usage.tokens_computed for update in updates] == [
        4 + 2,
        2 + 2,
        1 + 2,
        3 + 2,
    ]
    assert session.usage.tokens_computed == packed.usage.tokens_computed


async def test_a_new_version_scores_every_prefix_again(tmp_path: Path) -> None:
    engine = FakeEngine(policy_version=1)
    session = ScoringSession(engine, (answer(5),))
    first, second = await stream(session, [(1, 2), (3,)])
    await engine.load_weights(tmp_path, 2)
    third = await session.extend((4,))

    # 1+2+5+1 = 9; with 3: 12. Under version 2: 10, 13, and with 4: 17.
    assert [first.score.logprobs, second.score.logprobs] == [(((-1.0,),),), (((-0.3,),),)]
    assert (third.first_prefix, third.policy_version, third.route) == (0, 2, "fake")
    assert third.score.logprobs == (((-0.1,),), ((-0.4,),), ((-0.8,),))

    fourth = await session.extend((1,))
    assert (fourth.first_prefix, fourth.score.logprobs) == (3, (((-0.9,),),))


async def test_a_new_version_before_the_first_prefix_changes_nothing(tmp_path: Path) -> None:
    engine = FakeEngine()
    session = ScoringSession(engine, (answer(5),))
    await engine.load_weights(tmp_path, 3)
    update = await session.extend((1,))

    assert (update.first_prefix, update.policy_version, session.policy_version) == (0, 3, 3)
    assert update.score.logprobs == (((-1.0,),),)


async def test_new_weights_re_score_a_session_of_the_torch_engine(
    saved: SaveModel, start: StartEngine
) -> None:
    engine = start(saved(seed=0))
    session = ScoringSession(engine, ANSWERS)
    await stream(session, TURNS[:2])
    await engine.load_weights(saved(seed=1), 1)
    update = await session.extend(TURNS[2])
    job = rollout(TURNS[:3], *ANSWERS)

    assert update.first_prefix == 0
    check_plain(await engine.score([job]), [job], saved(seed=1))
    again = (await engine.score([job])).jobs[0]
    assert deviation(update.score.logprobs, again.logprobs) <= SAME_ATOL


async def test_a_refused_extension_leaves_the_session_as_it_was() -> None:
    session = ScoringSession(FakeEngine(max_tokens=5, poison_id=13), (answer(5),))
    await session.extend((1, 2))
    before = session.usage
    longer = await session.extend((1, 1, 1, 1))
    poisoned = await session.extend((13,))

    assert [longer.score.status, poisoned.score.status] == ["INVALID", "ERROR"]
    assert (session.token_ids, session.prefix_ends, session.usage) == ((1, 2), (2,), before)
    assert longer.score.logprobs == ()

    update = await session.extend((3,))
    assert (update.first_prefix, update.score.logprobs) == (1, (((-0.2,),),))  # 1+2+3+5 = 11
    assert session.usage == Usage(2 + 3, 2 + 3, 0, 2 + 3)


async def test_a_first_extension_that_fails_can_be_tried_again() -> None:
    session = ScoringSession(FakeEngine(poison_id=13), (answer(5),))
    failed = await session.extend((13,))
    assert failed.score == JobScore("ERROR", "token 13 is poison", usage=Usage(1, 1, 0, 1))

    update = await session.extend((1,))
    assert (update.first_prefix, update.score.logprobs) == (0, (((-0.7,),),))
