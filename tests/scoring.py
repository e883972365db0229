"""Scoring jobs for tests, what a plain forward says about them, and how many positions they are."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from services.reward_server.engines import (
    AnswerIds,
    Engine,
    SampleChunk,
    SampleParams,
    SampleRequest,
    ScoreJob,
    ScoreResult,
)

DEADLINE_S = 30.0
FP32_ATOL = 1e-4  # nats; what two exact fp32 implementations may differ by
SAME_ATOL = 1e-5  # nats; what the same engine may differ by, however it is asked

Logprobs = Sequence[Sequence[Sequence[float]]]  # [prefix][answer][token]
Result = TypeVar("Result")


def answer(*ids: int, scored: tuple[int, int] | None = None) -> AnswerIds:
    start, end = scored or (0, len(ids))
    return AnswerIds(ids, start, end)


def rollout(turns: Sequence[Sequence[int]], *answers: AnswerIds) -> ScoreJob:
    """A job with one prefix per turn; the first turn is the prompt."""
    ends = np.cumsum([len(turn) for turn in turns]).tolist()
    return ScoreJob(tuple(i for turn in turns for i in turn), tuple(ends), answers)


def inputs(job: ScoreJob) -> list[tuple[int, ...]]:
    """The model input up to the token that predicts the last scored one, per prefix and answer."""
    return [
        job.token_ids[:end] + a.token_ids[: a.scored_end - 1]
        for end in job.prefix_ends
        for a in job.answers
    ]


def total_positions(jobs: Sequence[ScoreJob]) -> int:
    return sum(len(ids) for job in jobs for ids in inputs(job))


def unique_positions(jobs: Sequence[ScoreJob]) -> int:
    """How many distinct prefixes the inputs have, by listing them all."""
    return len({ids[:n] for job in jobs for ids in inputs(job) for n in range(1, len(ids) + 1)})


@cache
def _plain(
    model_dir: Path, prefix: tuple[int, ...], ids: tuple[int, ...], start: int, end: int
) -> tuple[float, ...]:
    from tests.tiny_models import plain_logprobs  # transformers: not for tests of the fake

    return tuple(plain_logprobs(model_dir, prefix, ids, start, end))


def plain_scores(model_dir: Path, job: ScoreJob) -> Logprobs:
    """One full forward of the plain model per prefix and answer."""
    return [
        [
            _plain(model_dir, job.token_ids[:end], a.token_ids, a.scored_start, a.scored_end)
            for a in job.answers
        ]
        for end in job.prefix_ends
    ]


def deviation(left: Logprobs, right: Logprobs) -> float:
    """The largest difference of two tables of log-probs, which must have the same shape."""
    return max(
        abs(x - y)
        for left_k, right_k in zip(left, right, strict=True)
        for left_ka, right_ka in zip(left_k, right_k, strict=True)
        for x, y in zip(left_ka, right_ka, strict=True)
    )


def check_plain(
    result: ScoreResult, jobs: Sequence[ScoreJob], model_dir: Path, atol: float = FP32_ATOL
) -> None:
    """Every job is OK and has the scores of the plain model."""
    for score, job in zip(result.jobs, jobs, strict=True):
        assert score.status == "OK", score.reason
        assert deviation(score.logprobs, plain_scores(model_dir, job)) <= atol


def check_same(result: ScoreResult, other: ScoreResult, atol: float = SAME_ATOL) -> None:
    """Both scored every job, and alike."""
    for score, again in zip(result.jobs, other.jobs, strict=True):
        assert (score.status, again.status) == ("OK", "OK")
        assert deviation(score.logprobs, again.logprobs) <= atol


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Run one engine call from a test that is not async, as hypothesis wants it."""

    async def in_time() -> Result:
        async with asyncio.timeout(DEADLINE_S):
            return await work

    return asyncio.run(in_time())


def score(engine: Engine, *jobs: ScoreJob) -> ScoreResult:
    return run(engine.score(jobs))


class Sampled:
    """What one request gave: per sequence its tokens, log-probs and last chunk."""

    def __init__(self, n: int) -> None:
        self.ids: list[tuple[int, ...]] = [()] * n
        self.logprobs: list[tuple[float, ...]] = [()] * n
        self.last: list[SampleChunk | None] = [None] * n

    def add(self, chunk: SampleChunk) -> None:
        assert self.last[chunk.index] is None, "a chunk after the last one"
        self.ids[chunk.index] += chunk.token_ids
        self.logprobs[chunk.index] += chunk.logprobs
        if chunk.finish_reason:
            self.last[chunk.index] = chunk

    @property
    def finish(self) -> list[str | None]:
        return [chunk.finish_reason if chunk else None for chunk in self.last]

    @property
    def reasons(self) -> list[str]:
        return [chunk.reason if chunk else "" for chunk in self.last]


async def sample(engine: Engine, prompt: Sequence[int], **params: Any) -> Sampled:
    """Sample one request to its end."""
    request = SampleRequest(tuple(prompt), SampleParams(**params))
    sampled = Sampled(request.params.n)
    async with asyncio.timeout(DEADLINE_S):
        async for chunk in engine.sample(request):
            sampled.add(chunk)
    return sampled


async def first_chunk(chunks: AsyncIterator[SampleChunk]) -> SampleChunk:
    async with asyncio.timeout(DEADLINE_S):
        return await anext(chunks)
