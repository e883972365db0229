"""New weights: every reply is of the version it names, and a bad checkpoint changes nothing."""

import asyncio
import random
import re
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from services.reward_server.engines import ScoreJob, ScoreResult
from services.reward_server.engines.torch_engine import TorchEngine
from tests.scoring import (
    answer,
    check_plain,
    deviation,
    plain_scores,
    rollout,
    sample,
)
from tests.unit.services.reward_server.engines.conftest import SaveModel, StartEngine
from turnwise.errors import InvalidInput

pytestmark = pytest.mark.slow  # `make check` stays under a minute without it

PROMPT = (3, 1, 4, 1, 5)
JOBS = [rollout([PROMPT, (i, 9), (2,)], answer(6, 5, 3)) for i in range(6)]


async def keep_scoring(engine: TorchEngine, seed: int, until: asyncio.Event) -> list[Any]:
    """Score small random batches for as long as weights are swapped; return them with replies."""
    draw = random.Random(seed)
    replies: list[tuple[list[ScoreJob], ScoreResult]] = []
    while not until.is_set():
        jobs = draw.choices(JOBS, k=2)
        replies.append((jobs, await engine.score(jobs)))
        await asyncio.sleep(0)
    return replies


async def keep_sampling(engine: TorchEngine, seed: int, until: asyncio.Event) -> list[Any]:
    sampled = []
    while not until.is_set():
        sampled.append(await sample(engine, PROMPT, max_tokens=6, n=2, seed=seed))
    return sampled


def check_sampled(sampled: Any, paths: Sequence[Path]) -> int:
    """Log-probs are those of the version that every chunk names."""
    for ids, logprobs, last in zip(sampled.ids, sampled.logprobs, sampled.last, strict=True):
        path = paths[last.policy_version % 2]
        plain = plain_scores(path, rollout([PROMPT], answer(*ids)))
        assert deviation([[logprobs]], plain) <= 1e-4
    return int(sampled.last[0].policy_version)


@pytest.mark.parametrize("tied", [True, False])
async def test_every_reply_under_way_is_of_the_version_it_names(
    saved: SaveModel, start: StartEngine, tied: bool
) -> None:
    paths = [saved(seed=seed, tied=tied) for seed in (0, 1)]
    engine = start(paths[0], max_batch_tokens=16)
    done = asyncio.Event()
    scoring = [asyncio.create_task(keep_scoring(engine, seed, done)) for seed in range(6)]
    sampling = [asyncio.create_task(keep_sampling(engine, seed, done)) for seed in range(2)]
    for version in range(1, 4):
        await asyncio.sleep(0.05)
        await engine.load_weights(paths[version % 2], version)
    done.set()

    versions = set()
    for task in scoring:
        for jobs, result in await task:
            check_plain(result, jobs, paths[result.policy_version % 2])
            versions.add(result.policy_version)
    versions |= {check_sampled(s, paths) for task in sampling for s in await task}
    assert versions == {0, 1, 2, 3}
    # The two are far apart: scores of the wrong one, or of a stale cache, could not pass.
    assert deviation(plain_scores(paths[0], JOBS[0]), plain_scores(paths[1], JOBS[0])) > 1.0


async def test_nothing_cached_outlives_its_version(saved: SaveModel, start: StartEngine) -> None:
    old, new = saved(seed=0), saved(seed=1)
    engine = start(old)
    warm = [await engine.score(JOBS), await engine.score(JOBS)][1]
    await engine.load_weights(new, 1)
    after = await engine.score(JOBS)

    assert warm.usage.tokens_cached > 0
    assert after.usage.tokens_cached == 0
    check_plain(after, JOBS, new)


async def test_a_rollout_sampled_by_the_old_version_is_scored_by_the_new(
    saved: SaveModel, start: StartEngine
) -> None:
    old, new = saved(seed=0, tied=False), saved(seed=1, tied=False)
    engine = start(old)
    sampled = await sample(engine, PROMPT, max_tokens=10)
    await engine.load_weights(new, 1)
    job = rollout([PROMPT, sampled.ids[0]], answer(6, 5, 3))
    result = await engine.score([job])

    check_plain(result, [job], new)
    assert (result.policy_version, result.usage.tokens_cached) == (1, 0)


def truncated(path: Path, directory: Path) -> Path:
    shutil.copytree(path, directory, dirs_exist_ok=True)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return directory


@pytest.mark.parametrize("kind", ["missing", "truncated", "layers", "vocabulary", "family"])
async def test_an_unusable_checkpoint_leaves_the_old_version_serving(
    saved: SaveModel, start: StartEngine, tmp_path: Path, kind: str
) -> None:
    path = saved(seed=0)
    bad = {
        "missing": lambda: tmp_path / "nowhere",
        "truncated": lambda: truncated(path, tmp_path),
        "layers": lambda: saved(num_hidden_layers=1),
        "vocabulary": lambda: saved(vocab=401),
        "family": lambda: save_gpt2_config(tmp_path),
    }[kind]()
    engine = start(path, policy_version=7)
    await engine.score(JOBS)
    with pytest.raises(InvalidInput, match=re.escape(str(bad))):
        await engine.load_weights(bad, 8)
    result = await engine.score(JOBS)

    check_plain(result, JOBS, path)
    assert (engine.policy_version, result.policy_version) == (7, 7)
    assert result.usage.tokens_cached > 0, "the cache is still that of version 7"


def save_gpt2_config(directory: Path) -> Path:
    from transformers import GPT2Config

    GPT2Config().save_pretrained(directory)
    return directory


async def test_a_swap_waits_for_a_call_under_way(saved: SaveModel, start: StartEngine) -> None:
    engine = start(saved(seed=0), max_batch_tokens=4)
    under_way = asyncio.create_task(engine.score(JOBS))
    await asyncio.sleep(0)
    await engine.load_weights(saved(seed=1), 1)

    assert under_way.done()
    check_plain(await under_way, JOBS, saved(seed=0))


async def test_a_swap_that_is_cancelled_happens_whole_or_not_at_all(
    saved: SaveModel, start: StartEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [saved(seed=0), saved(seed=1)]
    engine = start(paths[0])
    serve = engine._serve
    swapping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slowly(*args: Any) -> None:
        loop.call_soon_threadsafe(swapping.set)
        time.sleep(0.05)
        serve(*args)

    monkeypatch.setattr(engine, "_serve", slowly)
    load = asyncio.create_task(engine.load_weights(paths[1], 1))
    await swapping.wait()
    load.cancel()
    await asyncio.wait([load])
    result = await engine.score(JOBS)

    check_plain(result, JOBS, paths[result.policy_version])


async def test_a_call_that_waited_for_a_swap_is_held_to_the_new_limit(
    saved: SaveModel, start: StartEngine
) -> None:
    engine = start(saved(seed=0))
    release = threading.Event()
    engine._thread.submit(release.wait, 20)
    under_way = asyncio.create_task(engine.score(JOBS))
    load = asyncio.create_task(engine.load_weights(saved(seed=1, max_position_embeddings=9), 1))
    while engine._lock._open.is_set():  # until the swap waits
        await asyncio.sleep(0.001)
    late = asyncio.create_task(engine.score(JOBS[:1]))
    await asyncio.sleep(0)
    release.set()
    await load

    check_plain(await under_way, JOBS, saved(seed=0))
    result = await late
    assert (result.policy_version, result.jobs[0].status) == (1, "INVALID")
    assert result.jobs[0].reason == "11 tokens with the answer exceed the limit of 9"
