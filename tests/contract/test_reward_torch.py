"""The reward server over the torch engine: what it says is what a plain forward says."""

import asyncio
import random
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import grpc
import pytest

from tests.reward_process import Server, policies, reward_server, rewards
from tests.scoring import FP32_ATOL
from tests.tiny_models import VOCAB, plain_logprobs, save_tiny_model
from turnwise.v1 import reward_pb2 as pb
from turnwise.v1 import reward_pb2_grpc
from turnwise.weights import publish

pytestmark = pytest.mark.slow  # loads torch in two processes

VERSIONS = (1, 2, 3)


class Served(NamedTuple):
    server: Server
    models: dict[int, Path]  # by policy version
    loads: list[pb.LoadPolicyRequest]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models")
    models = {v: save_tiny_model(folder / f"seed{v}", seed=v) for v in (0, *VERSIONS)}
    root, loads = folder / "weights", []
    for version in VERSIONS:

        def write(directory: Path, source: Path = models[version]) -> None:
            shutil.copytree(source, directory, dirs_exist_ok=True)

        new = publish(root, "demo", version, write)
        loads.append(
            pb.LoadPolicyRequest(
                path=new.path, policy_version=version, manifest_sha256=new.manifest_sha256
            )
        )
    flags = ("--model", str(models[0]), "--weights-root", str(root), "--device", "cpu")
    reference = ("--reference-model", str(models[3]), "--dtype", "float32")
    small_batches = {"TURNWISE_REWARD_SERVER__BATCH_TOKENS": "200"}  # calls go in pieces
    with reward_server(*flags, *reference, variables=small_batches) as server:
        yield Served(server, models, loads)


def rollout(draw: random.Random, turns: int = 3) -> pb.Rollout:
    ids: list[int] = []
    ends: list[int] = []
    for _ in range(turns):
        ids += [draw.randrange(VOCAB) for _ in range(draw.randint(3, 30))]
        ends.append(len(ids))
    answers = [
        pb.Answer(token_ids=[draw.randrange(VOCAB) for _ in range(6)], scored_start=2, scored_end=5)
        for _ in range(2)
    ]
    return pb.Rollout(token_ids=ids, prefix_ends=ends, answers=answers)


def plain_scores(model: Path, rollout: pb.Rollout) -> list[list[float]]:
    """[prefix][alias], by one plain forward each."""
    return [
        [
            fmean(plain_logprobs(model, rollout.token_ids[:end], a.token_ids, 2, 5))
            for a in rollout.answers
        ]
        for end in rollout.prefix_ends
    ]


def check(score: pb.RolloutScore, rollout: pb.Rollout, model: Path) -> None:
    assert score.status == pb.ROLLOUT_STATUS_OK, score.reason
    expected = plain_scores(model, rollout)
    got = [[answer.score for answer in prefix.answers] for prefix in score.prefixes]
    assert got == [pytest.approx(row, abs=FP32_ATOL) for row in expected]
    best = [max(row) for row in expected]
    assert [prefix.score for prefix in score.prefixes] == pytest.approx(best, abs=FP32_ATOL)
    gains = [b - a for a, b in pairwise(best)]
    assert list(score.gains) == pytest.approx(gains, abs=2 * FP32_ATOL)


def test_scores_are_those_of_a_plain_forward(served: Served) -> None:
    draw = random.Random(0)
    rollouts = [rollout(draw) for _ in range(6)]
    with grpc.insecure_channel(served.server.address) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        for scorer, model in ((pb.SCORER_POLICY, 0), (pb.SCORER_REFERENCE, 3)):
            options = pb.ScoreOptions(scorer=scorer)
            call = pb.ScoreTurnsRequest(rollouts=rollouts, options=options)
            reply = stub.ScoreTurns(call, timeout=60)

            assert (reply.policy_version, reply.route) == (0, "trie")
            for score, sent in zip(reply.scores, rollouts, strict=True):
                check(score, sent, served.models[model])
            usage = reply.usage
            assert usage.tokens_cached + usage.tokens_computed == usage.tokens_unique


def test_what_was_sampled_is_scored_with_its_cache(served: Served) -> None:
    prompt = [7] * 40
    with grpc.insecure_channel(served.server.address) as channel:
        request = pb.SampleRequest(
            prompts=[pb.SamplePrompt(token_ids=prompt)],
            params=pb.SamplingParams(temperature=0.0, max_tokens=20),
        )
        replies = [*reward_pb2_grpc.PolicyServiceStub(channel).Sample(request, timeout=60)]
        sampled = [token for reply in replies for token in reply.token_ids]
        logprobs = [value for reply in replies for value in reply.logprobs]
        sent = pb.Rollout(
            token_ids=prompt + sampled,
            prefix_ends=[40, 60],
            answers=[pb.Answer(token_ids=[1, 2, 3, 4, 5], scored_start=2)],
        )
        call = pb.ScoreTurnsRequest(rollouts=[sent])
        reply = reward_pb2_grpc.RewardServiceStub(channel).ScoreTurns(call, timeout=60)

    assert replies[-1].finish_reason == pb.FINISH_REASON_LENGTH
    plain = plain_logprobs(served.models[0], prompt, sampled, 0, 20)
    assert logprobs == pytest.approx(plain, abs=FP32_ATOL)
    assert reply.usage.tokens_cached >= 40 + 18
    expected = [
        fmean(plain_logprobs(served.models[0], ids, [1, 2, 3, 4, 5], 2, 5))
        for ids in (prompt, prompt + sampled)
    ]
    got = [prefix.score for prefix in reply.scores[0].prefixes]
    assert got == pytest.approx(expected, abs=FP32_ATOL)


async def test_every_reply_is_of_exactly_the_version_it_names(served: Served) -> None:
    draw = random.Random(1)
    checked: list[tuple[pb.RolloutScore, pb.Rollout]] = []
    loaded = asyncio.Event()
    async with grpc.aio.insecure_channel(served.server.address) as channel:
        stub, policy = rewards(channel), policies(channel)

        async def client() -> None:
            while not loaded.is_set():
                rollouts = [rollout(draw) for _ in range(8)]  # several pieces
                call = pb.ScoreTurnsRequest(rollouts=rollouts)
                reply = await stub.ScoreTurns(call, timeout=60)
                versions = {score.policy_version for score in reply.scores}
                assert versions == {reply.policy_version}
                checked.extend(zip(reply.scores, rollouts, strict=True))

        clients = [asyncio.create_task(client()) for _ in range(4)]
        for load in served.loads:
            await asyncio.sleep(0.3)
            assert (await policy.LoadPolicy(load, timeout=60)).policy_version in VERSIONS
        await asyncio.sleep(0.3)
        loaded.set()
        await asyncio.gather(*clients)

    by_version = {
        version: [pair for pair in checked if pair[0].policy_version == version]
        for version in (0, *VERSIONS)
    }
    assert all(by_version.values())
    divided = [e for e in served.server.events() if e["event"] == "version changed within a call"]
    assert divided, "no swap came between two pieces of a call: this test has shown nothing"
    for version, pairs in by_version.items():
        for score, sent in draw.sample(pairs, min(15, len(pairs))):
            check(score, sent, served.models[version])
