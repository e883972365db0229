"""The scorer when a deadline passes, a call is cancelled, a version changes or an engine fails."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import msgspec

from services.reward_server.call import Unscored
from services.reward_server.engines import EngineUnhealthy, ScoreJob, ScoreResult
from services.reward_server.engines.fake_engine import FakeEngine
from tests.scorer_stand import LATE, Gated, Stand, job, logprob, numbers, settle, warm


async def test_scores_come_in_order_with_version_and_route() -> None:
    scores = await Stand(FakeEngine()).score(job(3), job(1), job(2))

    assert numbers(scores) == [logprob(3), logprob(1), logprob(2)] == [-0.2, -0.2, -0.2]
    assert (scores.policy_version, scores.route) == (0, "fake")


async def test_what_waits_past_its_deadline_costs_no_compute() -> None:
    engine = Gated(gate_open=False)
    stand = Stand(engine)
    running = stand.start(1)
    await settle()

    late = await stand.score(job(2), job(3), within_s=0.02)

    assert late.jobs == (LATE, LATE)
    assert stand.scorer.queued_tokens == 0
    engine.gate.set()
    await running
    await settle()
    assert engine.batches == [[1]]


async def test_what_was_scored_before_the_deadline_is_kept() -> None:
    class SecondHangs(Gated):
        async def score(self, jobs: Sequence[ScoreJob]) -> ScoreResult:
            if self.batches:
                self.gate.clear()
            return await super().score(jobs)

    stand = Stand(SecondHangs(), batch_tokens=10)

    scores = await stand.score(job(1), job(2), job(3), within_s=0.05)

    assert numbers(scores) == [logprob(1)]
    assert scores.jobs[1:] == (LATE, LATE)


async def test_a_cancelled_call_frees_its_queue_and_stops_the_engine() -> None:
    engine = Gated(gate_open=False)
    stand = Stand(engine, batch_tokens=10)
    call = stand.start(1, 2, 3)
    await settle()
    assert stand.scorer.queued_tokens == 20

    call.cancel()
    await settle()

    assert stand.scorer.queued_tokens == 0
    assert engine.cancelled == 1
    engine.gate.set()
    assert numbers(await stand.score(job(4))) == [logprob(4)]
    assert engine.batches == [[1], [4]]


async def test_a_batch_goes_on_while_one_of_its_calls_is_wanted() -> None:
    engine = Gated()
    stand = await warm(Stand(engine, batch_window_s=0.01), engine)
    engine.gate.clear()
    gone, kept = stand.start(1, client="a"), stand.start(2, client="b")
    await asyncio.sleep(0.03)
    assert engine.batches == [[1, 2]]

    gone.cancel()
    await settle()
    engine.gate.set()

    assert numbers(await kept) == [logprob(2)]
    assert engine.cancelled == 0


async def test_a_version_that_changes_between_two_pieces_has_all_scored_again(
    tmp_path: Path,
) -> None:
    class SwapsAfterTwo(Gated):
        async def score(self, jobs: Sequence[ScoreJob]) -> ScoreResult:
            if len(self.batches) == 2:
                await self.load_weights(tmp_path, 5)
            return await super().score(jobs)

    engine = SwapsAfterTwo()
    stand = Stand(engine, batch_tokens=10)

    scores = await stand.score(job(1), job(2), job(3))

    assert engine.batches == [[1], [2], [3], [1], [2]]
    assert scores.policy_version == 5
    assert numbers(scores) == [logprob(i, version=5) for i in (1, 2, 3)] == [-0.7] * 3


async def test_a_batch_of_the_old_version_that_ends_late_is_scored_again(tmp_path: Path) -> None:
    class Overtaking(FakeEngine):
        """The first batch ends last, and the second one after a swap."""

        async def score(self, jobs: Sequence[ScoreJob]) -> ScoreResult:
            first = jobs[0].token_ids[0] == 1 and not self.policy_version
            if not first:
                self.policy_version = 5
            result = await super().score(jobs)
            if not first:
                return result
            await asyncio.sleep(0.02)
            return msgspec.structs.replace(result, policy_version=0)

    stand = Stand(Overtaking(), batch_tokens=10, running_batches=2)

    scores = await stand.score(job(1), job(2))

    assert scores.policy_version == 5
    assert numbers(scores) == [logprob(1, version=5), logprob(2, version=5)]


async def test_an_engine_that_raises_fails_only_the_call_it_cannot_do() -> None:
    class Picky(Gated):
        async def score(self, jobs: Sequence[ScoreJob]) -> ScoreResult:
            result = await super().score(jobs)
            if any(job.token_ids[0] == 13 for job in jobs):
                raise RuntimeError("no thirteen")
            return result

    engine = Picky()
    stand = await warm(Stand(engine, batch_window_s=0.02), engine)

    good, bad, fine = await asyncio.gather(
        stand.score(job(1), client="a"),
        stand.score(job(13), client="b"),
        stand.score(job(2), client="c"),
    )

    assert numbers(good) + numbers(fine) == [logprob(1), logprob(2)]
    assert bad.jobs == (Unscored("ERROR", "the engine failed: no thirteen"),)
    assert engine.batches == [[1, 13, 2], [1], [13], [2]]
    assert stand.unhealthy == []


async def test_an_unhealthy_engine_is_an_error_and_is_told() -> None:
    class Broken(FakeEngine):
        async def score(self, jobs: Sequence[ScoreJob]) -> ScoreResult:
            raise EngineUnhealthy("half a model")

    stand = Stand(Broken())

    scores = await stand.score(job(1))

    assert scores.jobs == (Unscored("ERROR", "the engine is unhealthy: half a model"),)
    assert stand.unhealthy == ["half a model"]
