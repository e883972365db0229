"""Replacing the weights: every reply is of exactly the version it names, or there is none."""

import asyncio
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from services.reward_server.engines import (
    Engine,
    EngineUnhealthy,
    SampleChunk,
    SampleParams,
    SampleRequest,
    ScoreJob,
    ScoreResult,
)
from tests.tiny_models import plain_logprobs, save_tiny_model
from tests.vllm.workloads import answer, busy, distance, plain_scores, rollout, tokens
from turnwise.errors import InvalidInput

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]


def check_version(result: ScoreResult, i: int, job: ScoreJob, versions: list[Path]) -> None:
    """The scores of job i are those of the version that the result names, and of no other."""
    assert result.jobs[i].status == "OK"
    for version, directory in enumerate(versions):
        difference = distance(result.jobs[i].logprobs, plain_scores(directory, job))
        # Random versions are far apart: the wrong one would be off by whole nats.
        assert difference < 1e-4 if version == result.policy_version else difference > 0.5


async def swap_under_load(engine: Engine, versions: list[Path], rng: random.Random) -> None:
    """Score and sample all the time, always the same, while version 1 and 2 are loaded."""
    prompt, gold = tokens(rng, 100), answer(*tokens(rng, 4))
    jobs = [rollout(prompt, [tokens(rng, 60), tokens(rng, 60)], gold) for _ in range(2)]
    scored: list[ScoreResult] = []
    sampled: list[list[SampleChunk]] = []
    stop = asyncio.Event()

    async def score() -> None:
        while not stop.is_set():
            scored.append(await engine.score(jobs))

    async def sample() -> None:
        while not stop.is_set():
            request = SampleRequest(prompt, SampleParams(max_tokens=60))
            sampled.append([chunk async for chunk in engine.sample(request)])

    async with asyncio.timeout(60.0), asyncio.TaskGroup() as group:
        for work in (score, score, sample, sample):
            group.create_task(work())
        for version in (1, 2):
            await asyncio.sleep(0.3)
            await engine.load_weights(versions[version], version)
            assert engine.policy_version == version
        await asyncio.sleep(0.3)
        stop.set()

    for version in range(3):
        replies = [result for result in scored if result.policy_version == version]
        for result in (*replies[:4], *replies[-4:]):  # the first under it and the last
            for i, job in enumerate(jobs):
                check_version(result, i, job, versions)
        samples = [chunks for chunks in sampled if chunks[0].policy_version == version]
        assert replies
        assert samples
        for chunks in (samples[0], samples[-1]):
            assert {chunk.policy_version for chunk in chunks} == {version}
            token_ids = [i for chunk in chunks for i in chunk.token_ids]
            expected = plain_logprobs(versions[version], prompt, token_ids, 0, 60)
            reported = [x for chunk in chunks for x in chunk.logprobs]
            assert reported == pytest.approx(expected, abs=1e-4)


async def test_no_reply_under_load_ever_uses_state_of_another_version_tied(
    tied_engine: Engine, tied_versions: list[Path], rng: random.Random
) -> None:
    await swap_under_load(tied_engine, tied_versions, rng)


async def test_no_reply_under_load_ever_uses_state_of_another_version_untied(
    untied_engine: Engine, untied_versions: list[Path], rng: random.Random
) -> None:
    await swap_under_load(untied_engine, untied_versions, rng)


async def test_calls_under_way_finish_as_they_began_and_a_call_made_meanwhile_gets_the_new(
    tied_engine: Engine, tied_versions: list[Path], rng: random.Random
) -> None:
    gold = answer(*tokens(rng, 3))
    early_jobs = [rollout(tokens(rng, 1500), [], gold) for _ in range(40)]
    late_jobs = [rollout(tokens(rng, 50), [], gold)]

    early = asyncio.create_task(tied_engine.score(early_jobs))
    await busy(tied_engine, 20)
    load = asyncio.create_task(tied_engine.load_weights(tied_versions[1], 1))
    await swap_waits(tied_engine)
    assert not early.done()
    late = asyncio.create_task(tied_engine.score(late_jobs))
    old, new = await asyncio.gather(early, late)
    await load

    assert (old.policy_version, new.policy_version) == (0, 1)
    for i in (0, 39):
        check_version(old, i, early_jobs[i], tied_versions)
    check_version(new, 0, late_jobs[0], tied_versions)


async def swap_waits(engine: Engine) -> None:
    async with asyncio.timeout(10.0):
        while not engine._lock._swaps:  # type: ignore[attr-defined]
            await asyncio.sleep(0)


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def change_rope(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5000.0
    (directory / "config.json").write_text(json.dumps(config))


def drop_norm(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (shutil.rmtree, "config.json is missing"),
        (lambda directory: (directory / "model.safetensors").unlink(), "no .*safetensors files"),
        (lambda directory: (directory / "config.json").write_text("{"), "config.json cannot"),
        (truncate, "model.safetensors cannot be read"),
        (change_rope, "rope_parameters is .*5000.0"),
        (
            lambda directory: save_tiny_model(directory, intermediate_size=64),
            "intermediate_size is 64, the served model has 192",
        ),
        (lambda directory: save_tiny_model(directory, "llama"), "model_type is 'llama'"),
        (drop_norm, "tensor model.norm.weight is missing here and of shape .128. in the served"),
        (lambda directory: save_tiny_model(directory, tied=False), "tie_word_embeddings is False"),
    ],
)
async def test_an_unusable_checkpoint_is_refused_and_the_old_version_goes_on_serving(
    tied_engine: Engine,
    tied_versions: list[Path],
    tmp_path: Path,
    rng: random.Random,
    spoil: Callable[[Path], object],
    said: str,
) -> None:
    jobs = [rollout(tokens(rng, 64), [], answer(*tokens(rng, 2)))]
    before = await tied_engine.score(jobs)
    spoil(shutil.copytree(tied_versions[1], tmp_path / "spoiled"))

    with pytest.raises(InvalidInput, match=said):
        await tied_engine.load_weights(tmp_path / "spoiled", 9)

    after = await tied_engine.score(jobs)
    assert (after.policy_version, tied_engine.policy_version) == (0, 0)
    assert after.jobs[0].usage.tokens_cached == 32  # not even the cache was touched
    assert distance(after.jobs[0].logprobs, before.jobs[0].logprobs) < 1e-5


async def test_a_cancelled_load_is_completed_before_the_cancellation_takes_effect(
    tied_engine: Engine, tied_versions: list[Path], rng: random.Random
) -> None:
    jobs = [rollout(tokens(rng, 64), [], answer(*tokens(rng, 2)))]
    load = asyncio.create_task(tied_engine.load_weights(tied_versions[2], 2))
    while not tied_engine._unhealthy:  # type: ignore[attr-defined]  # the swap is under way
        await asyncio.sleep(0)

    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load

    check_version(await tied_engine.score(jobs), 0, jobs[0], tied_versions)
    assert tied_engine.policy_version == 2


async def test_a_load_that_breaks_off_half_way_makes_the_engine_unhealthy_for_ever(
    untied_engine: Engine, untied_versions: list[Path], tmp_path: Path, rng: random.Random
) -> None:
    checkpoint = shutil.copytree(untied_versions[1], tmp_path / "vanishing")
    jobs = [rollout(tokens(rng, 1500), [], answer(1)) for _ in range(40)]
    scoring = asyncio.create_task(untied_engine.score(jobs))
    await busy(untied_engine, 20)
    loading = asyncio.create_task(untied_engine.load_weights(checkpoint, 4))
    await swap_waits(untied_engine)
    # Found good, it now waits for the call under way; vLLM's worker will find half a file.
    truncate(checkpoint)
    waiting = asyncio.create_task(untied_engine.score(jobs))

    await scoring
    with pytest.raises(EngineUnhealthy, match="version 4 broke off half-way"):
        await loading
    with pytest.raises(EngineUnhealthy, match="half-way"):
        await waiting
    with pytest.raises(EngineUnhealthy, match="half-way"):
        await anext(untied_engine.sample(SampleRequest((1,), SampleParams(max_tokens=1))))
    with pytest.raises(EngineUnhealthy, match="half-way"):
        await untied_engine.load_weights(untied_versions[1], 5)
    assert await untied_engine._llm.is_paused()  # type: ignore[attr-defined]
