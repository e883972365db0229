"""Scoring over vLLM: exact, shared, counted, isolated, cancelled; against a plain forward."""

import asyncio
import random
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from services.reward_server.engines import Engine, EngineUnhealthy, Route, ScoreJob, Usage
from services.reward_server.engines.session import ScoringSession
from services.reward_server.engines.usage import count_tokens
from tests.tiny_models import VOCAB, save_tiny_model
from tests.vllm.workloads import (
    MAX_TOKENS,
    answer,
    assert_idle,
    busy,
    distance,
    plain_scores,
    rollout,
    running,
    tokens,
)

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="session")]


def mixed_jobs(rng: random.Random) -> list[ScoreJob]:
    """Every shape of a rollout that is special in some way."""
    prompt, other_prompt = tokens(rng, 70), tokens(rng, 33)
    a, b, c, d = tokens(rng, 4)
    plain = answer(a, b, c, d, scored=(1, 3))
    turns = [tokens(rng, length) for length in (40, 1, 1, 25)]
    return [
        rollout(prompt, turns, plain),
        rollout(prompt, turns, plain),  # an identical rollout
        rollout(prompt, [turns[0], tokens(rng, 31)], plain),  # the same first turn
        rollout(prompt, [], plain),  # T = 1: no prefix but the prompt
        rollout(other_prompt, turns, answer(a, b), answer(a, b, c, d)),  # one begins the other
        rollout(other_prompt, turns[:2], answer(d)),  # nothing but the boundary token
        rollout(prompt, [[a, b, c], turns[3]], answer(a, b, c, d)),  # along the policy's turn
        rollout(tokens(rng, 1), [tokens(rng, 1)], answer(a), answer(a)),
    ]


async def test_all_shapes_of_rollouts_are_scored_as_by_a_plain_forward(
    tied_engine: Engine, tied_versions: list[Path], rng: random.Random
) -> None:
    jobs = mixed_jobs(rng)

    result = await tied_engine.score(jobs)

    assert (result.policy_version, result.route) == (0, "forced_decode")
    assert [job.status for job in result.jobs] == ["OK"] * len(jobs)
    for job, score in zip(jobs, result.jobs, strict=True):
        assert distance(score.logprobs, plain_scores(tied_versions[0], job)) < 1e-4
    counted = count_tokens(jobs)
    assert [job.usage.tokens_total for job in result.jobs] == [u.tokens_total for u in counted]
    assert [job.usage.tokens_unique for job in result.jobs] == [u.tokens_unique for u in counted]
    assert result.usage.tokens_cached == 0


async def test_untied_llama_is_scored_as_by_a_plain_forward(
    untied_engine: Engine, untied_versions: list[Path], rng: random.Random
) -> None:
    jobs = mixed_jobs(rng)

    result = await untied_engine.score(jobs)

    for job, score in zip(jobs, result.jobs, strict=True):
        assert distance(score.logprobs, plain_scores(untied_versions[0], job)) < 1e-4


async def test_a_lone_job_computes_its_inputs_and_neither_the_last_token_nor_the_tail(
    tied_engine: Engine, rng: random.Random
) -> None:
    a, b, c, tail = tokens(rng, 4)
    job = ScoreJob(tokens(rng, 50), (50,), (answer(a, b, c, tail, tail, scored=(1, 3)),))

    result = await tied_engine.score([job])

    # 50 of the prefix, a and b; c is predicted from b, and the tail is not needed at all.
    assert result.usage == Usage(52, 52, tokens_cached=0, tokens_computed=52)


async def test_realistic_groups_compute_little_more_than_the_trie_and_nothing_twice_later(
    tied_engine: Engine, rng: random.Random
) -> None:
    jobs = []
    for _ in range(2):
        prompt, gold = tokens(rng, 230), answer(*tokens(rng, 6))
        for _ in range(4):
            turns = [tokens(rng, rng.randrange(150, 350)) for _ in range(5)]
            jobs.append(rollout(prompt, turns, gold))

    first = (await tied_engine.score(jobs)).usage
    again = (await tied_engine.score(jobs)).usage

    assert first.tokens_cached == 0
    assert first.tokens_total / first.tokens_unique > 3
    assert 1.0 <= first.tokens_computed / first.tokens_unique <= 1.10
    # Only the last, partly filled block of each prefix and its answer are computed again.
    assert again.tokens_unique == first.tokens_unique
    assert again.tokens_unique <= again.tokens_cached + again.tokens_computed
    assert again.tokens_computed <= 8 * 6 * (32 + 6)


async def test_what_jobs_share_is_computed_once_and_counted_at_the_first(
    tied_engine: Engine, rng: random.Random
) -> None:
    job = rollout(tokens(rng, 64), [tokens(rng, 64)], answer(*tokens(rng, 3)))

    result = await tied_engine.score([job, job, job])

    first, *copies = [score.usage for score in result.jobs]
    assert first == Usage(64 + 128 + 2 * 2, 128 + 2 * 2, 0, 128 + 2 * 2)
    assert copies == [Usage(tokens_total=first.tokens_total)] * 2
    assert result.jobs[1].logprobs == result.jobs[0].logprobs


async def test_a_job_past_a_limit_is_invalid_and_the_others_are_scored(
    tied_engine: Engine, rng: random.Random
) -> None:
    fits = rollout(tokens(rng, MAX_TOKENS - 3), [], answer(*tokens(rng, 3)))
    too_long = rollout(tokens(rng, MAX_TOKENS - 2), [], answer(*tokens(rng, 3)))
    no_token = rollout(tokens(rng, 5), [], answer(VOCAB))

    result = await tied_engine.score([too_long, fits, no_token])

    assert [job.status for job in result.jobs] == ["INVALID", "OK", "INVALID"]
    assert f"{MAX_TOKENS + 1} tokens" in result.jobs[0].reason
    assert f"limit of {MAX_TOKENS}" in result.jobs[0].reason
    assert f"token id {VOCAB}" in result.jobs[2].reason
    assert result.jobs[0].usage == result.jobs[2].usage == Usage()
    assert (await tied_engine.score([too_long])).jobs == result.jobs[:1]


async def test_a_score_that_is_no_number_is_an_error_of_its_job_alone(
    untied_engine: Engine, untied_versions: list[Path], tmp_path: Path, rng: random.Random
) -> None:
    nan_token = VOCAB - 1
    spoiled = shutil.copytree(untied_versions[0], tmp_path / "spoiled")
    weights = load_file(spoiled / "model.safetensors")
    weights["model.embed_tokens.weight"][nan_token] = float("nan")
    save_file(weights, spoiled / "model.safetensors", {"format": "pt"})
    await untied_engine.load_weights(spoiled, 1)
    prompt, gold = tokens(rng, 40), answer(*tokens(rng, 3))
    good = [rollout(prompt, [tokens(rng, 40)], gold) for _ in range(2)]
    bad = rollout(prompt, [(nan_token, 1, 2)], gold)

    for _ in range(2):  # again: what it left in the cache spoils nothing
        result = await untied_engine.score([good[0], bad, good[1]])

        assert [job.status for job in result.jobs] == ["OK", "ERROR", "OK"]
        assert result.jobs[1].reason == "prefix 1, answer 0: vLLM returned a log-prob of nan"
        assert result.jobs[1].logprobs == ()
        for job, score in zip(good, (result.jobs[0], result.jobs[2]), strict=True):
            assert distance(score.logprobs, plain_scores(untied_versions[0], job)) < 1e-4


async def test_a_session_agrees_with_the_packed_rollout_and_reuses_the_cache(
    tied_engine: Engine, rng: random.Random
) -> None:
    parts = [tokens(rng, length) for length in (90, 80, 1, 120)]
    gold = answer(*tokens(rng, 5), scored=(1, 4))
    session = ScoringSession(tied_engine, [gold])

    updates = [await session.extend(part) for part in parts]
    packed = await tied_engine.score([rollout(parts[0], parts[1:], gold)])

    stepwise = [prefix for update in updates for prefix in update.score.logprobs]
    assert distance(stepwise, packed.jobs[0].logprobs) < 1e-5
    lengths = [sum(map(len, parts[: k + 1])) for k in range(4)]
    for (before, length), update in zip(pairwise(lengths), updates[1:], strict=True):
        usage = update.score.usage
        assert usage.tokens_cached == before // 32 * 32  # all whole blocks
        assert usage.tokens_computed == length + 3 - usage.tokens_cached


async def test_cancelling_frees_the_work_inside_vllm_at_once(
    tied_engine: Engine, rng: random.Random
) -> None:
    jobs = [rollout(tokens(rng, 1500), [tokens(rng, 500)], answer(1, 2)) for _ in range(60)]
    scoring = asyncio.create_task(tied_engine.score(jobs))
    await busy(tied_engine, 20)

    scoring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scoring

    await assert_idle(tied_engine)


async def test_a_call_that_takes_too_long_fails_and_is_aborted(
    untied_engine: Engine, monkeypatch: pytest.MonkeyPatch, rng: random.Random
) -> None:
    monkeypatch.setattr(untied_engine, "_call_timeout_s", 0.05)
    jobs = [rollout(tokens(rng, 1500), [], answer(1, 2)) for _ in range(60)]

    with pytest.raises(TimeoutError, match=r"within 0.05 s"):
        await untied_engine.score(jobs)

    await assert_idle(untied_engine)


async def test_info_tells_what_runs(tied_engine: Engine, tied_versions: list[Path]) -> None:
    info = tied_engine.info()

    assert (info.engine, info.route, info.dtype, info.device) == (
        "vllm",
        "forced_decode",
        "float32",
        "cpu",
    )
    assert (info.model, info.vocab_size) == (str(tied_versions[0]), VOCAB)
    assert (info.max_tokens, info.cache_limit_bytes) == (MAX_TOKENS, 1 << 28)
    weights = (tied_versions[0] / "model.safetensors").stat().st_size
    assert abs(info.memory_bytes - info.cache_limit_bytes - weights) < 10_000  # the file's header


async def test_a_route_that_cannot_run_here_is_refused_at_start(tied_versions: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"route trace_replay is not available.*V1 model runner"):
        async with running(tied_versions[0], route="trace_replay"):
            pass


@pytest.mark.parametrize(
    ("asked", "runs_v2", "chosen"),
    [
        (None, False, "forced_decode"),
        (None, True, "trace_replay"),
        ("forced_decode", False, "forced_decode"),
        ("trace_replay", True, "trace_replay"),
        ("prompt_logprobs", False, "prompt_logprobs"),
        ("prompt_logprobs", True, "prompt_logprobs"),
    ],
)
async def test_the_route_follows_from_what_the_model_runner_can_do(
    asked: Route | None, runs_v2: bool, chosen: Route
) -> None:
    from services.reward_server.engines.vllm_start import choose_route

    assert choose_route(asked, runs_v2) == chosen


async def test_the_uncached_baseline_is_exact_on_a_sliding_window_and_a_dead_engine_says_so(
    models: Path, rng: random.Random
) -> None:
    model = save_tiny_model(models / "window", "mistral", seed=5, sliding_window=48)
    async with running(model, route="prompt_logprobs") as engine:
        assert engine.info().max_tokens == MAX_TOKENS - 1
        jobs = mixed_jobs(rng)

        result = await engine.score(jobs)

        assert result.route == "prompt_logprobs"
        for job, score in zip(jobs, result.jobs, strict=True):
            assert distance(score.logprobs, plain_scores(model, job)) < 1e-4
        assert result.usage.tokens_cached == 0
        assert result.usage.tokens_computed > 2 * result.usage.tokens_unique

        long_jobs = [rollout(tokens(rng, 1500), [], answer(1)) for _ in range(60)]
        under_way = asyncio.create_task(engine.score(long_jobs))
        llm = await busy(engine, 20)
        llm.engine_core.resources.engine_manager.processes[0].kill()
        with pytest.raises(EngineUnhealthy, match="died"):
            await under_way
        with pytest.raises(EngineUnhealthy, match="died"):
            await engine.score(jobs)
        with pytest.raises(EngineUnhealthy, match="died"):
            await engine.load_weights(model, 1)
