"""The torch engine on CUDA against a plain forward per prefix on the CPU."""

import random
from pathlib import Path

import pytest

from services.reward_server.engines import ScoreJob
from services.reward_server.engines.torch_engine import TorchEngine
from tests.scoring import (
    SAME_ATOL,
    answer,
    check_plain,
    check_same,
    deviation,
    plain_scores,
    rollout,
    sample,
    score,
)
from tests.tiny_models import VOCAB, Family, save_tiny_model

pytestmark = pytest.mark.gpu


def group(draw: random.Random) -> list[ScoreJob]:
    """Eight rollouts of two questions, one of them twice, with a wrapped answer and an alias."""

    def ids(tokens: int) -> list[int]:
        return draw.choices(range(VOCAB), k=tokens)

    jobs = []
    for prompt in (ids(40), ids(150)):
        aliases = (answer(*ids(9), scored=(2, 8)), answer(*ids(1)))
        rollouts = [[prompt, *(ids(draw.randint(1, 60)) for _ in range(4))] for _ in range(4)]
        jobs += [rollout(turns, *aliases) for turns in rollouts]
    return [*jobs, jobs[3]]


@pytest.mark.parametrize("attention", ["flex", "dense"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_scores_equal_a_plain_forward_per_prefix(
    tmp_path: Path, family: Family, attention: str
) -> None:
    path, jobs = save_tiny_model(tmp_path, family), group(random.Random(family))
    engine = TorchEngine(path, device="cuda", attention=attention)
    cold = score(engine, *jobs)
    check_plain(cold, jobs, path)
    check_same(score(engine, *jobs), cold)

    small = TorchEngine(path, device="cuda", attention=attention, max_batch_tokens=128)
    check_same(score(small, *jobs[::-1][:3]), type(cold)(cold.jobs[::-1][:3], 0, "trie"))


def test_bf16_stays_near_fp32(tmp_path: Path) -> None:
    path, jobs = save_tiny_model(tmp_path), group(random.Random(1))
    result = score(TorchEngine(path, device="cuda", dtype="bfloat16"), *jobs)
    for one, job in zip(result.jobs, jobs, strict=True):
        assert deviation(one.logprobs, plain_scores(path, job)) < 1.0


async def test_sampled_logprobs_are_those_of_the_plain_model(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path)
    engine = TorchEngine(path, device="cuda")
    sampled = await sample(engine, (3, 1, 4), max_tokens=40, n=5, seed=1)
    for ids, logprobs in zip(sampled.ids, sampled.logprobs, strict=True):
        plain = plain_scores(path, rollout([(3, 1, 4)], answer(*ids)))
        assert deviation([[logprobs]], plain) <= 10 * SAME_ATOL
    await engine.close()
