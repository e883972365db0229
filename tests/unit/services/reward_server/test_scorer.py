"""The scorer over the fake engine: who shares a batch, who waits, who is refused."""

import asyncio

import pytest

from services.reward_server.engines.fake_engine import FakeEngine
from services.reward_server.errors import Overloaded
from tests.scorer_stand import Gated, Stand, job, logprob, numbers, settle, warm


async def test_calls_that_come_within_the_window_share_a_batch() -> None:
    engine = Gated()
    stand = await warm(Stand(engine, batch_window_s=0.05), engine)

    tasks = [stand.start(i, client=str(i)) for i in range(1, 4)]
    await asyncio.sleep(0.01)
    await asyncio.gather(*tasks, stand.score(job(4)), stand.score(job(5)))

    assert engine.batches == [[1, 2, 3, 4, 5]]


async def test_a_call_that_comes_alone_waits_for_nobody() -> None:
    stand = Stand(Gated(), batch_window_s=60.0)

    for i in (1, 2, 3):
        assert numbers(await stand.score(job(i))) == [logprob(i)]


async def test_a_full_batch_does_not_wait_for_the_window() -> None:
    engine = Gated()
    stand = await warm(Stand(engine, batch_window_s=60.0), engine)

    await asyncio.gather(*[stand.score(job(i), client=str(i)) for i in range(1, 11)])


async def test_while_a_batch_runs_the_next_one_gathers() -> None:
    engine = Gated(gate_open=False)
    stand = Stand(engine)
    tasks = [stand.start(1)]
    await settle()
    tasks += [stand.start(i) for i in (2, 3, 4)]
    await settle()
    engine.gate.set()
    await asyncio.gather(*tasks)

    assert engine.batches == [[1], [2, 3, 4]]


async def test_a_batch_holds_at_most_the_budget_and_one_large_job_goes_alone() -> None:
    engine = Gated()
    stand = Stand(engine, batch_tokens=30)

    await stand.score(job(1), job(2), job(3), job(4), job(5, cost=90), job(6))

    assert engine.batches == [[1, 2, 3], [4], [5], [6]]


async def test_a_budget_of_one_token_switches_batching_off() -> None:
    engine = Gated()
    stand = Stand(engine, batch_tokens=1)

    await asyncio.gather(*[stand.score(job(i)) for i in (1, 2, 3)])

    assert engine.batches == [[1], [2], [3]]


async def test_small_calls_pass_between_the_pieces_of_a_huge_one() -> None:
    engine = Gated(gate_open=False)
    stand = Stand(engine, batch_tokens=20)
    huge = stand.start(*[1] * 50, client="huge")
    await settle()
    small = [stand.start(2, client="a"), stand.start(3, client="b")]
    await settle()
    engine.gate.set()
    await asyncio.gather(*small)

    assert engine.batches[:2] == [[1, 1], [2, 3]]
    assert not huge.done()
    assert len(numbers(await huge)) == 50


async def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    engine = Gated(gate_open=False)
    stand = Stand(engine, max_queued_tokens=50, batch_tokens=10)
    running = stand.start(1)
    await settle()
    waiting = stand.start(2, 3, 4, 5)
    await settle()
    assert stand.scorer.queued_tokens == 40

    with pytest.raises(Overloaded, match="40 tokens are queued, max_queued_tokens=50") as refusal:
        await stand.score(job(6), job(7))
    last = stand.start(8)  # there is room for one

    assert 0.05 <= refusal.value.retry_after_s <= 30.0
    engine.gate.set()
    await asyncio.gather(running, waiting, last)
    assert stand.scorer.queued_tokens == 0


async def test_a_call_larger_than_the_queue_gets_as_far_as_there_is_room() -> None:
    stand = Stand(Gated(), max_queued_tokens=30)

    scores = await stand.score(job(1), job(2), job(3), job(4), job(5, cost=31))

    assert numbers(scores) == [logprob(1), logprob(2), logprob(3)]
    assert [s.status for s in scores.jobs[3:]] == ["OVERLOADED", "INVALID"]
    assert scores.jobs[3].reason == "the call needs 71 tokens, max_queued_tokens=30; send less"
    assert scores.jobs[4].reason == "31 tokens exceed the limit max_queued_tokens=30"


async def test_the_queue_and_the_work_are_measured() -> None:
    stand = Stand(FakeEngine())

    await stand.score(job(1), job(1), job(2))

    def value(name: str, **labels: str) -> float | None:
        return stand.registry.get_sample_value(f"turnwise_reward_{name}", labels)

    assert value("tokens_total", kind="total") == 30
    assert value("tokens_total", kind="computed") == 20
    assert value("batch_rollouts_sum") == 3
    assert value("batch_tokens_sum") == 30
    assert value("queued_tokens") == 0
    assert value("seconds_count", phase="queue") == 1
    assert value("reuse_ratio_sum") == pytest.approx(1 / 3)


async def test_a_thousand_small_calls_are_few_batches() -> None:
    engine = Gated()
    stand = Stand(engine, batch_tokens=5000)

    done = await asyncio.gather(*[stand.score(job(i % 50), client=str(i)) for i in range(1000)])

    assert [numbers(scores) for scores in done] == [[logprob(i % 50)] for i in range(1000)]
    assert len(engine.batches) < 20
