"""The torch engine by example: limits, counts, precision and calls side by side."""

import asyncio
import random
from collections.abc import Callable

import pytest

from services.reward_server.engines import Engine, ScoreJob, Usage
from tests.scoring import answer, check_plain, check_same, deviation, plain_scores, rollout, score
from tests.tiny_models import VOCAB
from tests.unit.services.reward_server.engines.conftest import SaveModel, StartEngine


def ids_of(tokens: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=tokens)


def group(rollouts: int = 3, prompt: int = 20, turns: int = 3, turn: int = 9) -> list[ScoreJob]:
    """Rollouts of one question, with a wrapped answer and an alias."""
    asked = ids_of(prompt, seed=99)
    aliases = (answer(*ids_of(7, seed=98), scored=(2, 6)), answer(5))
    return [
        rollout([asked, *(ids_of(turn, seed=100 * r + t) for t in range(turns))], *aliases)
        for r in range(rollouts)
    ]


@pytest.mark.parametrize("budget", [7, 8192])
@pytest.mark.parametrize("tied", [True, False])
def test_a_rollout_of_64_one_token_turns(
    saved: SaveModel, start: StartEngine, budget: int, tied: bool
) -> None:
    path = saved(tied=tied)
    job = rollout([ids_of(30, 1), *([i] for i in ids_of(63, 2))], answer(1, 2, 3, scored=(1, 3)))
    result = score(start(path, max_batch_tokens=budget), job)

    assert len(result.jobs[0].logprobs) == 64
    check_plain(result, [job], path)
    # Inputs 93, and after each of 64 prefixes 1 2; no turn begins with 1.
    assert 1 not in job.token_ids[30:]
    assert result.usage == Usage(sum(range(30, 94)) + 64 * 2, 93 + 64 * 2, 0, 93 + 64 * 2)


@pytest.mark.parametrize("settings", [{"rope_parameters": "linear"}, {"head_dim": 64}])
def test_positions_go_by_depth_also_where_the_rotary_embedding_is_scaled(
    saved: SaveModel, start: StartEngine, settings: dict[str, object]
) -> None:
    if "rope_parameters" in settings:
        settings = {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5}
        }
    path = saved("llama", **settings)
    jobs = group()
    check_plain(score(start(path), *jobs), jobs, path)


def test_identical_rollouts_are_computed_once(saved: SaveModel, start: StartEngine) -> None:
    (job,) = group(1)
    result = score(start(saved()), job, job, job, job)

    # Prompt 20, three turns of 9, and 5 inputs of one answer after four prefixes.
    once = 20 + 3 * 9 + 4 * 5
    total = 2 * (20 + 29 + 38 + 47) + 4 * 5
    assert [one.usage for one in result.jobs] == [
        Usage(total, once, 0, once),
        *[Usage(total, 0, 0, 0)] * 3,
    ]
    assert len({one.logprobs for one in result.jobs}) == 1


def test_a_held_token_whose_state_was_not_kept_is_computed_once_more(
    saved: SaveModel, start: StartEngine
) -> None:
    engine, ids, asked = start(saved()), ids_of(10, 1), answer(3, 4)
    score(engine, rollout([ids], asked))
    job = rollout([ids[:5], ids[5:]], asked)
    result = score(engine, job)

    check_plain(result, [job], saved())
    # Of 10 + 2 positions the two answer inputs are new; token 5 has to say what follows it.
    assert result.usage == Usage(6 + 11, 12, 10, 2 + 1)


def test_a_job_much_larger_than_the_budget_is_scored_in_several_passes(
    saved: SaveModel, start: StartEngine
) -> None:
    engine = start(saved(), max_batch_tokens=16)
    jobs = [rollout([ids_of(200, 1), ids_of(50, 2)], answer(*ids_of(30, 3))), *group(2)]
    check_plain(score(engine, *jobs), jobs, engine.model_path)


def test_a_job_past_the_models_limit_is_invalid_and_names_it(
    saved: SaveModel, start: StartEngine
) -> None:
    path = saved(max_position_embeddings=40)
    fits = rollout([ids_of(30, 1), ids_of(4, 2)], answer(*ids_of(8, 3), scored=(1, 6)))
    longer = rollout([ids_of(30, 1), ids_of(5, 2)], answer(*ids_of(8, 3), scored=(1, 6)))
    engine = start(path)
    result = score(engine, longer, fits)  # 35 + 6 and 34 + 6 tokens

    assert [job.status for job in result.jobs] == ["INVALID", "OK"]
    assert result.jobs[0].reason == "41 tokens with the answer exceed the limit of 40"
    assert (result.jobs[0].logprobs, result.jobs[0].usage) == ((), Usage())
    assert deviation(result.jobs[1].logprobs, plain_scores(path, fits)) <= 1e-4
    assert engine.info().max_tokens == 40


def test_a_sliding_window_is_the_limit(saved: SaveModel, start: StartEngine) -> None:
    path = saved("mistral", sliding_window=24)
    fits, longer = (rollout([ids_of(n, 1)], answer(3, 4)) for n in (22, 23))
    result = score(start(path), fits, longer)

    assert [job.status for job in result.jobs] == ["OK", "INVALID"]
    assert "exceed the limit of 24" in result.jobs[1].reason
    assert deviation(result.jobs[0].logprobs, plain_scores(path, fits)) <= 1e-4


def test_an_id_outside_the_vocabulary_makes_its_job_invalid(
    saved: SaveModel, start: StartEngine
) -> None:
    good = rollout([(1, 2)], answer(3, VOCAB - 1))
    jobs = [rollout([(1, VOCAB)], answer(3)), good, rollout([(1, 2)], answer(3, VOCAB))]
    result = score(start(saved()), *jobs)

    assert [job.status for job in result.jobs] == ["INVALID", "OK", "INVALID"]
    assert result.jobs[0].reason == f"token id {VOCAB} is outside the vocabulary of {VOCAB}"


def test_a_call_without_jobs_has_no_scores(saved: SaveModel, start: StartEngine) -> None:
    result = score(start(saved(), policy_version=4))
    assert (result.jobs, result.policy_version, result.usage) == ((), 4, Usage())


def test_bf16_stays_near_fp32(
    saved: SaveModel, start: StartEngine, record_property: Callable[[str, object], None]
) -> None:
    path, jobs = saved("qwen3", tied=False), group()
    exact = [plain_scores(path, job) for job in jobs]
    result = score(start(path, dtype="bfloat16"), *jobs)
    differences = [
        abs(x - y)
        for job, plain in zip(result.jobs, exact, strict=True)
        for ours, theirs in zip(job.logprobs, plain, strict=True)
        for ours_a, theirs_a in zip(ours, theirs, strict=True)
        for x, y in zip(ours_a, theirs_a, strict=True)
    ]
    mean, most = sum(differences) / len(differences), max(differences)
    record_property("bf16_mean_deviation_nats", round(mean, 4))
    record_property("bf16_max_deviation_nats", round(most, 4))
    print(f"bf16 deviates from fp32 by {mean:.4f} nats on average, at most {most:.4f}")

    assert 0 < mean < 0.1
    assert most < 1.0


async def test_calls_at_the_same_time_get_what_they_would_get_alone(
    saved: SaveModel, start: StartEngine
) -> None:
    engine: Engine = start(saved(), max_batch_tokens=40)
    jobs = group(8)
    results = await asyncio.gather(*(engine.score([job]) for job in jobs))
    for job, result in zip(jobs, results, strict=True):
        check_plain(result, [job], saved())


def test_the_cache_stays_within_its_limit_and_is_reported(
    saved: SaveModel, start: StartEngine
) -> None:
    token_bytes = 2 * 2 * 2 * 32 * 4  # layers, key and value, heads, width, fp32
    engine = start(saved(), cache_bytes=40 * token_bytes, policy_version=3)
    first = score(engine, *group(6))
    info = engine.info()

    assert 0 < info.cache_bytes <= 40 * token_bytes
    assert info.cache_bytes % token_bytes == 0
    assert info.memory_bytes > info.cache_bytes
    assert (info.engine, info.route, info.dtype, info.device) == ("torch", "trie", "float32", "cpu")
    assert (info.vocab_size, info.cache_limit_bytes) == (VOCAB, 40 * token_bytes)
    assert (first.policy_version, first.route) == (3, "trie")
    check_same(score(engine, *group(6)), first)


async def test_asking_for_info_while_scoring_is_safe(saved: SaveModel, start: StartEngine) -> None:
    engine = start(saved(), max_batch_tokens=8)
    scoring = asyncio.create_task(engine.score(group(12)))
    while not scoring.done():
        assert engine.info().cache_bytes >= 0
        await asyncio.sleep(0)
    assert all(job.status == "OK" for job in (await scoring).jobs)
