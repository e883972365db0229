"""The torch engine under everything at once, and on tries of a realistic size."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from services.reward_server.engines import ScoreJob
from services.reward_server.engines.torch_engine import TorchEngine
from tests.scoring import answer, check_plain, deviation, plain_scores, rollout, sample, score
from tests.tiny_models import VOCAB
from tests.unit.services.reward_server.engines.conftest import SaveModel, StartEngine

pytestmark = pytest.mark.slow

SWAPS = 10
ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {"tied": True}),
    ("qwen2", {"tied": False}),
    ("qwen3", {"tied": True}),
    ("llama", {"tied": False, "rope_parameters": ROPE}),
    ("mistral", {"tied": False, "num_key_value_heads": 1}),
]


def questions(draw: random.Random, count: int, turns: int, longest: int) -> list[ScoreJob]:
    """Four rollouts per question, with turns of one token to `longest`, and two answers."""

    def ids(tokens: int) -> list[int]:
        return draw.choices(range(VOCAB), k=tokens)

    jobs = []
    for _ in range(count):
        prompt = ids(draw.randint(1, 2 * longest))
        aliases = (answer(*ids(9), scored=(3, 8)), answer(*ids(2)))
        for _ in range(4):
            more = [ids(draw.randint(1, longest)) for _ in range(turns)]
            jobs.append(rollout([prompt, *more], *aliases))
    return draw.sample(jobs, k=len(jobs))


@pytest.mark.parametrize(("family", "settings"), MODELS)
@pytest.mark.parametrize("budget", [100, 8192])
def test_groups_of_long_rollouts(
    saved: SaveModel, start: StartEngine, family: str, settings: dict[str, Any], budget: int
) -> None:
    path = saved(family, **settings)
    jobs = questions(random.Random(budget), count=2, turns=6, longest=60)
    check_plain(score(start(path, max_batch_tokens=budget), *jobs), jobs, path)


class Soak:
    """Random calls against one engine, each reply checked against the version it names."""

    def __init__(self, engine: TorchEngine, paths: list[Path], seed: int) -> None:
        self.engine, self.paths = engine, paths
        self.draw = random.Random(seed)
        self.pool = questions(self.draw, count=2, turns=3, longest=6)
        self.versions: set[int] = set()

    def path(self, version: int) -> Path:
        self.versions.add(version)
        return self.paths[version % len(self.paths)]

    async def score(self) -> None:
        jobs = self.draw.choices(self.pool, k=self.draw.randint(1, 5))
        result = await self.engine.score(jobs)
        check_plain(result, jobs, self.path(result.policy_version))

    async def sample(self) -> None:
        prompt = self.draw.choice(self.pool).token_ids[:9]
        tokens = self.draw.randint(1, 30)
        sampled = await sample(self.engine, prompt, max_tokens=tokens, n=self.draw.randint(1, 3))
        for ids, logprobs, last in zip(sampled.ids, sampled.logprobs, sampled.last, strict=True):
            assert last is not None
            plain = plain_scores(self.path(last.policy_version), rollout([prompt], answer(*ids)))
            assert deviation([[logprobs]], plain) <= 1e-4

    async def give_up(self) -> None:
        """Start something and cancel it at a random moment."""
        work = asyncio.create_task(self.draw.choice([self.score, self.sample])())
        await asyncio.sleep(self.draw.random() / 50)
        work.cancel()
        await asyncio.wait([work])
        if not work.cancelled():
            work.result()  # it was faster: then it is right

    async def user(self) -> None:
        while self.engine.policy_version < SWAPS:
            await self.draw.choice([self.score, self.score, self.sample, self.give_up])()

    async def trainer(self) -> None:
        for version in range(1, SWAPS + 1):
            await asyncio.sleep(0.3)
            await self.engine.load_weights(self.paths[version % len(self.paths)], version)


@pytest.mark.parametrize("cache_bytes", [0, 40_000, 1 << 24])
async def test_everything_at_once(saved: SaveModel, start: StartEngine, cache_bytes: int) -> None:
    paths = [saved("qwen3", seed=seed) for seed in (0, 1)]
    engine = start(paths[0], max_batch_tokens=40, cache_bytes=cache_bytes, max_running=6)
    soak = Soak(engine, paths, seed=cache_bytes)
    async with asyncio.timeout(60):
        await asyncio.gather(*(soak.user() for _ in range(6)), soak.trainer())
        await soak.score()
        while engine.sampler.busy():
            await asyncio.sleep(0.01)

    assert soak.versions == set(range(SWAPS + 1))
    assert engine.trie.bytes() <= cache_bytes
    assert not any(run.transient for run in engine.trie.runs())
    assert engine._listeners == {}
