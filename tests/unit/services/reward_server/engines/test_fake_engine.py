"""The fake engine's numbers, worked out by hand, and that it keeps the Engine contract."""

import asyncio
import time
from pathlib import Path

import pytest

from services.reward_server.engines import Engine, SampleParams, SampleRequest, Usage
from services.reward_server.engines.fake_engine import FakeEngine
from tests.scoring import answer, first_chunk, rollout, sample


async def test_scores_by_hand() -> None:
    engine: Engine = FakeEngine(policy_version=2)
    # 7 after 1 2: 1+2+7+2 = 12 -> -0.3; 8 after 1 2 7: 20 -> -0.1.
    # After 1 2 5: 17 -> -0.8 and 25 -> -0.6.
    result = await engine.score([rollout([(1, 2), (5,)], answer(7, 8))])

    assert result.jobs[0].logprobs == (((-0.3, -0.1),), ((-0.8, -0.6),))
    assert (result.policy_version, result.route) == (2, "fake")


async def test_only_the_span_is_scored_but_the_wrapper_counts_as_context() -> None:
    wrapped = answer(50, 7, 60, scored=(1, 2))
    result = await FakeEngine().score([rollout([(1,)], wrapped, answer(7))])

    assert result.jobs[0].logprobs == (((-0.9,), (-0.9,)),)  # 1+50+7 = 58, and 1+7 = 8


async def test_usage_counts_shared_tokens_once_and_calls_all_of_them_computed() -> None:
    first, second = (rollout([(1, 2, 3), (turn,)], answer(7, 8)) for turn in (4, 5))
    result = await FakeEngine().score([first, second])

    # Inputs 1 2 3 7 and 1 2 3 4 7; the second job adds only 5 7.
    assert [job.usage for job in result.jobs] == [Usage(9, 6, 0, 6), Usage(9, 2, 0, 2)]


async def test_what_is_poison_too_long_or_no_token_fails_alone() -> None:
    engine = FakeEngine(poison_id=13, max_tokens=4, vocab_size=20)
    jobs = [
        rollout([(1, 13)], answer(3)),
        rollout([(1,)], answer(3, 13)),
        rollout([(1, 2)], answer(3, 4)),
        rollout([(1, 2, 3)], answer(3, 4)),
        rollout([(1, 20)], answer(3)),
    ]
    result = await engine.score(jobs)

    assert [(job.status, job.reason) for job in result.jobs] == [
        ("ERROR", "token 13 is poison"),
        ("ERROR", "token 13 is poison"),
        ("OK", ""),
        ("INVALID", "5 tokens with the answer exceed the limit of 4"),
        ("INVALID", "token id 20 is outside the vocabulary of 20"),
    ]
    assert [len(job.logprobs) for job in result.jobs] == [0, 0, 1, 0, 0]


async def test_a_call_of_which_nothing_is_left_has_no_scores() -> None:
    engine = FakeEngine(max_tokens=3)
    assert (await engine.score([])).jobs == ()
    assert (await engine.score([rollout([(1, 2, 3, 4)], answer(5))])).usage == Usage()


async def test_time_passes_per_computed_token_and_a_call_can_be_cancelled() -> None:
    engine = FakeEngine(seconds_per_token=0.01)
    started = time.monotonic()
    await engine.score([rollout([(1, 2, 3)], answer(4, 5))])
    assert 0.04 <= time.monotonic() - started < 1.0

    slow = FakeEngine(seconds_per_token=60)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await slow.score([rollout([(1,)], answer(2))])


async def test_samples_by_hand() -> None:
    # Sequence 0: 3+4+0+1 = 8, then 16 -> 6 (vocabulary 10); sequence 1: 9, then 3+4+9+1+1 = 18.
    sampled = await sample(FakeEngine(policy_version=1, vocab_size=10), (3, 4), max_tokens=2, n=2)

    assert sampled.ids == [(8, 6), (9, 8)]
    # 3+4+8+1 = 16 -> -0.7; 15+6+1 = 22 -> -0.3; 3+4+9+1 = 17 -> -0.8; 16+8+1 = 25 -> -0.6.
    assert sampled.logprobs == [(-0.7, -0.3), (-0.8, -0.6)]
    assert sampled.finish == ["length", "length"]
    assert [chunk.usage for chunk in sampled.last if chunk] == [
        Usage(3, 3, 0, 3),
        Usage(3, 1, 0, 1),
    ]


async def test_a_stop_id_ends_the_sequence_and_stays() -> None:
    sampled = await sample(FakeEngine(), (3, 4), max_tokens=9, stop_token_ids=(14,))

    assert (sampled.ids, sampled.finish, sampled.reasons) == ([(7, 14)], ["stop"], ["14"])


async def test_a_prompt_that_is_poison_or_leaves_no_room_samples_nothing() -> None:
    engine = FakeEngine(poison_id=13, max_tokens=3)
    poisoned = await sample(engine, (13,), max_tokens=1)
    full = await sample(engine, (1, 2, 3), max_tokens=1)
    cut = await sample(engine, (1, 2), max_tokens=5)

    assert (poisoned.ids, poisoned.finish) == ([()], ["error"])
    assert (full.ids, full.finish) == ([()], ["error"])
    assert (cut.ids, cut.finish) == ([(3,)], ["length"])


async def test_new_weights_wait_for_calls_under_way_and_change_the_next(tmp_path: Path) -> None:
    engine = FakeEngine(seconds_per_token=0.01)
    job = rollout([(1, 2)], answer(3))
    under_way = asyncio.create_task(engine.score([job]))
    await asyncio.sleep(0)
    await engine.load_weights(tmp_path, 5)

    assert under_way.done()
    assert (await under_way).policy_version == 0
    result = await engine.score([job])
    assert (result.policy_version, result.jobs[0].logprobs) == (5, (((-0.2,),),))  # 1+2+3+5 = 11


async def test_a_missing_checkpoint_changes_nothing(tmp_path: Path) -> None:
    engine = FakeEngine(policy_version=3)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        await engine.load_weights(tmp_path / "nowhere", 4)

    assert engine.policy_version == 3
    assert engine.info().route == "fake"


async def test_a_closed_stream_lets_new_weights_in(tmp_path: Path) -> None:
    engine = FakeEngine()
    chunks = engine.sample(SampleRequest((1,), SampleParams(max_tokens=100)))
    assert (await first_chunk(chunks)).token_ids == (1,)
    await chunks.aclose()  # type: ignore[attr-defined]
    async with asyncio.timeout(5):
        await engine.load_weights(tmp_path, 1)

    assert engine.policy_version == 1
