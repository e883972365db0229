"""A scorer over a fake engine that notes its batches and waits at a gate."""

import asyncio
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from services.reward_server.call import CallScores, Unscored
from services.reward_server.engines import JobScore, ScoreJob, ScoreResult
from services.reward_server.engines.fake_engine import FakeEngine
from services.reward_server.metrics import ServerMetrics
from services.reward_server.scorer import Scorer
from tests.scoring import answer

COST = 10  # tokens of every job here

LATE = Unscored("DEADLINE", "the deadline passed before it was scored")


def job(token: int, cost: int = COST) -> ScoreJob:
    """`cost` equal tokens and an answer of one token, which is no input."""
    return ScoreJob((token,) * cost, (cost,), (answer(1),))


def logprob(token: int, version: int = 0) -> float:
    return -(1 + (COST * token + 1 + version) % 10) / 10


class Gated(FakeEngine):
    """Notes every batch by its jobs' first tokens, and works only while the gate is open."""

    def __init__(self, gate_open: bool = True) -> None:
        super().__init__()
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.cancelled = 0
        if gate_open:
            self.gate.set()

    async def score(self, jobs: Sequence[ScoreJob]) -> ScoreResult:
        self.batches.append([job.token_ids[0] for job in jobs])
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return await super().score(jobs)


class Stand:
    """A scorer and how it is asked."""

    def __init__(self, engine: FakeEngine, **options: float) -> None:
        self.unhealthy: list[str] = []
        self.registry = CollectorRegistry()
        values: dict[str, float] = {
            "batch_tokens": 100,
            "batch_window_s": 0.0,
            "max_queued_tokens": 10_000,
            "running_batches": 1,
        }
        self.scorer = Scorer(
            engine,
            ServerMetrics(self.registry),
            on_unhealthy=self.unhealthy.append,
            **(values | options),  # type: ignore[arg-type]
        )

    async def score(self, *jobs: ScoreJob, within_s: float = 5.0, client: str = "c") -> CallScores:
        costs = [len(j.token_ids) for j in jobs]
        deadline = asyncio.get_running_loop().time() + within_s
        return await self.scorer.score(jobs, costs, deadline, client)

    def start(
        self, *tokens: int, within_s: float = 5.0, client: str = "c"
    ) -> asyncio.Task[CallScores]:
        return asyncio.create_task(self.score(*map(job, tokens), within_s=within_s, client=client))


async def warm(stand: Stand, engine: Gated) -> Stand:
    """Let a batch of several calls go by: from then on the window is waited for."""
    engine.gate.clear()
    tasks = [stand.start(90)]
    await settle()
    tasks += [stand.start(*[91] * 5), stand.start(*[92] * 5)]  # full, so it does not wait
    await settle()
    engine.gate.set()
    await asyncio.gather(*tasks)
    engine.batches.clear()
    return stand


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def numbers(scores: CallScores) -> list[float]:
    return [s.logprobs[0][0][0] for s in scores.jobs if isinstance(s, JobScore)]
