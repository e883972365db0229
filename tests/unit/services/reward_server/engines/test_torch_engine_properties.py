"""The torch engine against one plain forward per prefix, on tries that hypothesis grows."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.reward_server.engines import AnswerIds, ScoreJob, ScoreResult, Usage
from services.reward_server.engines.session import ScoringSession
from services.reward_server.engines.torch_engine import TorchEngine
from services.reward_server.engines.usage import count_tokens
from tests.batches import batches
from tests.scoring import (
    SAME_ATOL,
    check_plain,
    check_same,
    deviation,
    run,
    score,
    total_positions,
    unique_positions,
)
from tests.unit.services.reward_server.engines.conftest import SaveModel, StartEngine

pytestmark = pytest.mark.slow  # `make check` stays under a minute without it

BUDGETS = [1, 7, 50, 8192]
MEGABYTE = 1 << 20
# The engines are shared by all examples on purpose: their caches hold what came before.
SHARED = [HealthCheck.function_scoped_fixture]


def forget(engine: TorchEngine) -> None:
    """Make the engine cold, as after loading its weights again."""
    engine._serve(engine.model_path, engine.model)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
@settings(max_examples=12, deadline=None)
@given(jobs=batches(), budget=st.sampled_from(BUDGETS))
def test_scores_equal_a_plain_forward_per_prefix(
    saved: SaveModel, engines: StartEngine, family: str, jobs: list[ScoreJob], budget: int
) -> None:
    path = saved(family)
    check_plain(score(engines(path, max_batch_tokens=budget), *jobs), jobs, path)


@pytest.mark.parametrize("backend", ["dense", pytest.param("flex", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=10, deadline=None)
@given(jobs=batches(max_jobs=3))
def test_scores_do_not_depend_on_the_attention_backend(
    saved: SaveModel, engines: StartEngine, backend: str, jobs: list[ScoreJob]
) -> None:
    path = saved()
    expected = score(engines(path), *jobs)
    check_same(score(engines(path, attention=backend, max_batch_tokens=16), *jobs), expected)


@settings(max_examples=20, deadline=None)
@given(jobs=batches(), data=st.data())
def test_scores_do_not_depend_on_batch_order_budget_or_cache(
    saved: SaveModel, engines: StartEngine, jobs: list[ScoreJob], data: st.DataObject
) -> None:
    path = saved()
    calm = engines(path)
    forget(calm)
    expected = score(calm, *jobs)
    budget = data.draw(st.sampled_from(BUDGETS))
    cache_bytes = data.draw(st.sampled_from([0, 5_000, MEGABYTE]))  # 1 kB per token
    engine = engines(path, max_batch_tokens=budget, cache_bytes=cache_bytes)

    order = data.draw(st.permutations(range(len(jobs))))
    shuffled = score(engine, *(jobs[i] for i in order))
    check_same(
        ScoreResult(tuple(shuffled.jobs[order.index(i)] for i in range(len(jobs))), 0, "trie"),
        expected,
    )
    engine.trie.evict(engine.trie.bytes() // 2)
    for job, once in zip(jobs, expected.jobs, strict=True):  # alone, half of it cached
        assert deviation(score(engine, job).jobs[0].logprobs, once.logprobs) <= SAME_ATOL


@settings(max_examples=15, deadline=None)
@given(jobs=batches(max_jobs=3), budget=st.sampled_from(BUDGETS))
def test_streamed_scores_equal_packed_ones(
    saved: SaveModel, engines: StartEngine, jobs: list[ScoreJob], budget: int
) -> None:
    path = saved()
    expected = score(engines(path), *jobs)
    engine = engines(path, max_batch_tokens=budget)

    async def stream(job: ScoreJob) -> list[tuple[tuple[float, ...], ...]]:
        session = ScoringSession(engine, job.answers)
        starts = (0, *job.prefix_ends)
        updates = [
            await session.extend(job.token_ids[start:end])
            for start, end in zip(starts, job.prefix_ends, strict=False)
        ]
        return [update.score.logprobs[0] for update in updates]

    for job, once in zip(jobs, expected.jobs, strict=True):
        assert deviation(run(stream(job)), once.logprobs) <= SAME_ATOL


def context_positions(jobs: list[ScoreJob]) -> int:
    contexts = [ScoreJob(j.token_ids, j.prefix_ends, (AnswerIds((0,), 0, 1),)) for j in jobs]
    return unique_positions(contexts)


@settings(max_examples=25, deadline=None)
@given(jobs=batches())
def test_usage_of_one_pass_cold_then_warm(
    saved: SaveModel, engines: StartEngine, jobs: list[ScoreJob]
) -> None:
    engine = engines(saved())
    forget(engine)
    total, unique = total_positions(jobs), unique_positions(jobs)
    contexts = context_positions(jobs)

    assert score(engine, *jobs).usage == Usage(total, unique, 0, unique)
    # Answers are dropped after a call; contexts stay, with the states that predict answers.
    assert score(engine, *jobs).usage == Usage(total, unique, contexts, unique - contexts)


@settings(max_examples=25, deadline=None)
@given(
    jobs=batches(),
    budget=st.sampled_from(BUDGETS),
    cache_bytes=st.sampled_from([0, 5_000, MEGABYTE]),
)
def test_usage_in_many_passes(
    saved: SaveModel, engines: StartEngine, jobs: list[ScoreJob], budget: int, cache_bytes: int
) -> None:
    engine = engines(saved(), max_batch_tokens=budget, cache_bytes=cache_bytes)
    forget(engine)
    counted = [(u.tokens_total, u.tokens_unique) for u in count_tokens(jobs)]
    for cold in (True, False):
        result = score(engine, *jobs)
        usages = [job.usage for job in result.jobs]

        assert [(u.tokens_total, u.tokens_unique) for u in usages] == counted
        assert result.usage.tokens_unique == unique_positions(jobs)
        assert all(n >= 0 for u in usages for n in (u.tokens_cached, u.tokens_computed))
        assert result.usage.tokens_cached <= (0 if cold else context_positions(jobs))
        # More than unique where a position was computed again: see Counter.again.
        assert result.usage.tokens_cached + result.usage.tokens_computed >= unique_positions(jobs)
