"""The route of GPUs, trace replay: vLLM's own code for it, with the kernels interpreted."""

import asyncio
import os
import random
import sys
from pathlib import Path

import msgspec
import pytest

from services.reward_server.engines import ScoreResult
from tests.vllm.workloads import answer, distance, plain_scores, rollout, tokens

pytestmark = pytest.mark.vllm

HERE = Path(__file__).parent


async def test_trace_replay_scores_as_a_plain_forward_from_the_cache_and_after_a_swap(
    tied_versions: list[Path], tmp_path: Path, rng: random.Random
) -> None:
    a, b, c, d = tokens(rng, 4)
    aliases = (answer(a, b, c, d, scored=(1, 3)), answer(a), answer(d, c))
    prompt = tokens(rng, 60)
    jobs = [rollout(prompt, [tokens(rng, 40), tokens(rng, 1)], *aliases) for _ in range(2)]
    (tmp_path / "jobs").write_bytes(msgspec.json.encode(jobs))

    path = os.pathsep.join([str(HERE / "interpreted_triton"), str(HERE.parents[1])])

    child = await asyncio.create_subprocess_exec(
        sys.executable,
        HERE / "trace_replay_child.py",
        *tied_versions[:2],
        tmp_path / "jobs",
        tmp_path / "results",
        env=os.environ | {"PYTHONPATH": path, "VLLM_USE_V2_MODEL_RUNNER": "1"},
    )
    async with asyncio.timeout(120.0):
        assert await child.wait() == 0
    results = msgspec.json.decode((tmp_path / "results").read_bytes(), type=list[ScoreResult])

    assert [result.route for result in results] == ["trace_replay"] * 3
    assert [result.policy_version for result in results] == [0, 0, 1]
    for result in results:
        for job, score in zip(jobs, result.jobs, strict=True):
            expected = plain_scores(tied_versions[result.policy_version], job)
            assert distance(score.logprobs, expected) < 1e-4
    first, again, swapped = [result.usage for result in results]
    assert first.tokens_cached == swapped.tokens_cached == 0
    # Whole blocks of 32 are there: one for the prompt, three for the longer prefixes. The rest
    # of the prompt is run again for its own score, so 32 and, per rollout, 60..95 came cached.
    assert again.tokens_cached == 32 + 2 * 36
