"""Rollouts to score, engines to score them with, and the plain forward they must agree with."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from services.reward_server.engines import AnswerIds, Engine, ScoreJob
from tests.tiny_models import VOCAB, plain_logprobs

MAX_TOKENS = 2048

LIMITS: dict[str, Any] = {
    "dtype": "float32",
    "max_tokens": MAX_TOKENS,
    "kv_cache_bytes": 1 << 28,
    "max_batch_tokens": 2048,
    "max_batch_requests": 64,
}


@asynccontextmanager
async def running(model: Path, processes: bool = False, **limits: Any) -> AsyncIterator[Engine]:
    """Start an engine; without `processes` its worker shares vLLM's core process (faster)."""
    from services.reward_server.engines.vllm_engine import VllmEngine

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1" if processes else "0")
        engine = await VllmEngine.start(model, **(LIMITS | limits))
    try:
        yield engine
    finally:
        await engine.close()


async def busy(engine: Engine, requests: int) -> Any:
    """Wait until vLLM has so many requests to work on; return its AsyncLLM."""
    llm = engine._llm  # type: ignore[attr-defined]
    async with asyncio.timeout(10.0):
        while llm.get_num_unfinished_requests() < requests:
            await asyncio.sleep(0.001)
    return llm


async def assert_idle(engine: Engine) -> None:
    """Nothing is unfinished here, nor does vLLM's own process have anything to wait for."""
    llm = engine._llm  # type: ignore[attr-defined]
    assert llm.get_num_unfinished_requests() == 0
    async with asyncio.timeout(5.0):
        await llm.pause_generation(mode="wait", clear_cache=False)
        await llm.resume_generation()


def tokens(rng: random.Random, length: int) -> tuple[int, ...]:
    """Draw any ids but the last, which some test keeps for itself."""
    return tuple(rng.randrange(VOCAB - 1) for _ in range(length))


def answer(*token_ids: int, scored: tuple[int, int] | None = None) -> AnswerIds:
    start, end = scored or (0, len(token_ids))
    return AnswerIds(token_ids, start, end)


def rollout(prompt: Sequence[int], turns: Sequence[Sequence[int]], *answers: AnswerIds) -> ScoreJob:
    """A job that scores after the prompt and after every turn."""
    token_ids, ends = tuple(prompt), [len(prompt)]
    for turn in turns:
        token_ids += tuple(turn)
        ends.append(len(token_ids))
    return ScoreJob(token_ids, tuple(ends), answers)


def plain_scores(model: Path, job: ScoreJob) -> list[list[list[float]]]:
    """What JobScore.logprobs has to be: one plain forward per prefix and answer."""
    return [
        [
            plain_logprobs(model, job.token_ids[:end], a.token_ids, a.scored_start, a.scored_end)
            for a in job.answers
        ]
        for end in job.prefix_ends
    ]


def distance(
    scores: Sequence[Sequence[Sequence[float]]], other: Sequence[Sequence[Sequence[float]]]
) -> float:
    """The largest difference of two log-probs (nats); the shapes must be the same."""
    return max(
        abs(x - y)
        for answers, other_answers in zip(scores, other, strict=True)
        for logprobs, other_logprobs in zip(answers, other_answers, strict=True)
        for x, y in zip(logprobs, other_logprobs, strict=True)
    )
