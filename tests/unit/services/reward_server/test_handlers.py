"""What both front doors do with a call, over the fake engine."""

import asyncio
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from services.reward_server.engines import EngineUnhealthy
from services.reward_server.engines.fake_engine import FakeEngine
from services.reward_server.errors import (
    InvalidRequest,
    NotReady,
    RequestTooLarge,
)
from services.reward_server.handlers import Handlers
from services.reward_server.metrics import ServerMetrics
from services.reward_server.requests import Limits
from services.reward_server.tokenizer import TokenizerSource
from tests.reward_stand import ERROR, INVALID, OK, POISON, Stand, publish_version, rollout
from turnwise.v1 import reward_pb2 as pb


# Prefix (1): 1+5=6 -> -0.7. Prefix (1,2,4): 7+5=12 -> -0.3.
async def test_a_rollout_is_scored_by_hand_worked_numbers() -> None:
    reply = await Stand().score(rollout(1, 2, 4), token_logprobs=True)

    (score,) = reply.scores
    assert score.status == OK
    assert [prefix.score for prefix in score.prefixes] == [-0.7, -0.3]
    assert [list(p.answers[0].token_logprobs) for p in score.prefixes] == [
        pytest.approx([-0.7]),
        pytest.approx([-0.3]),
    ]
    assert list(score.gains) == pytest.approx([0.4])
    assert (score.rollout_id, score.policy_version, score.route) == ("r1", 0, "fake")
    assert score.usage == pb.Usage(tokens_total=4, tokens_unique=3, tokens_computed=3)
    assert reply.usage == score.usage


async def test_a_bad_rollout_among_a_hundred_leaves_99_ok() -> None:
    rollouts = [rollout(i % 50, 2, 4) for i in range(100)]
    rollouts[17] = rollout(POISON, 2, 4)
    rollouts[42] = rollout(1, 2, 4, ends=(3, 2))
    stand = Stand()

    reply = await stand.score(*rollouts)

    assert [i for i, s in enumerate(reply.scores) if s.status != OK] == [17, 42]
    assert (reply.scores[17].status, reply.scores[17].reason) == (ERROR, "token 66 is poison")
    assert reply.scores[42].status == INVALID
    assert not reply.scores[42].prefixes
    assert stand.value("rollouts_total", status="OK") == 98
    assert stand.value("prefixes_total") == 196


async def test_usage_adds_up_to_the_trie_of_the_call() -> None:
    reply = await Stand().score(rollout(1, 2, 4), rollout(1, 2, 3))

    assert [s.usage.tokens_unique for s in reply.scores] == [3, 1]
    assert reply.usage == pb.Usage(tokens_total=8, tokens_unique=4, tokens_computed=4)


async def test_a_leaked_answer_is_flagged() -> None:
    reply = await Stand().score(rollout(1, 2, 4, answer=1), rollout(1, 2, 4, answer=2))

    assert [score.answer_leaked for score in reply.scores] == [True, False]


async def test_the_reference_scores_when_it_is_asked_for() -> None:
    stand = Stand(FakeEngine(policy_version=3), reference=FakeEngine())

    reply = await stand.score(rollout(1, 2, 4), scorer=pb.SCORER_REFERENCE, min_policy_version=9)
    policy = await stand.score(rollout(1, 2, 4))

    assert [p.score for p in reply.scores[0].prefixes] == [-0.7, -0.3]
    assert (reply.policy_version, policy.policy_version) == (0, 3)
    assert [p.score for p in policy.scores[0].prefixes] == [-1.0, -0.6]
    assert (await stand.handlers.info()).reference_model == "fake"


async def test_without_a_reference_it_cannot_be_asked_for() -> None:
    with pytest.raises(InvalidRequest, match="no reference model"):
        await Stand().score(rollout(1, 2, 4), scorer=pb.SCORER_REFERENCE)


async def test_a_version_not_served_in_time_is_a_deadline_of_every_rollout() -> None:
    stand = Stand()
    request = pb.ScoreTurnsRequest(
        rollouts=[rollout(1, 2, 4), rollout(1, ends=[])],
        options=pb.ScoreOptions(min_policy_version=2),
    )

    reply = await stand.handlers.score_turns(request, 0.02)

    assert [s.status for s in reply.scores] == [pb.ROLLOUT_STATUS_DEADLINE, INVALID]
    assert reply.scores[0].reason == "min_policy_version 2 was not served in time, 0 is"


async def test_a_call_waits_for_the_version_it_needs(tmp_path: Path) -> None:
    stand = Stand(root=tmp_path)
    waiting = asyncio.create_task(stand.score(rollout(1, 2, 4), min_policy_version=2))
    await asyncio.sleep(0.01)

    loaded = await stand.handlers.load_policy(publish_version(tmp_path, 2))

    assert loaded.policy_version == 2
    assert (await waiting).policy_version == 2


async def test_a_broken_version_leaves_the_old_one_serving(tmp_path: Path) -> None:
    stand = Stand(root=tmp_path)
    request = publish_version(tmp_path, 2)
    request.manifest_sha256 = "0" * 64

    with pytest.raises(InvalidRequest, match="announced was 0000"):
        await stand.handlers.load_policy(request)

    assert (await stand.handlers.ready())[0]
    assert (await stand.score(rollout(1, 2, 4))).policy_version == 0
    assert stand.value("load_failures_total") == 1


async def test_before_serving_and_while_draining_calls_are_refused() -> None:
    handlers = Handlers(ServerMetrics(CollectorRegistry()), Limits(), TokenizerSource(None))
    with pytest.raises(NotReady, match="loading the model"):
        await handlers.info()
    assert await handlers.ready() == (False, "loading the model")

    stand = Stand(FakeEngine(seconds_per_token=0.01))
    under_way = asyncio.create_task(stand.score(rollout(1, 2, 4)))
    await asyncio.sleep(0)
    stand.handlers.refuse("draining")

    with pytest.raises(NotReady, match="draining"):
        await stand.score(rollout(1, 2, 4))
    await stand.handlers.idle()
    assert (await under_way).scores[0].status == OK


async def test_an_unhealthy_engine_is_an_error_and_the_server_is_not_ready() -> None:
    class Broken(FakeEngine):
        async def score(self, jobs: object) -> object:  # type: ignore[override]
            raise EngineUnhealthy("half a model")

    stand = Stand(Broken())

    reply = await stand.score(rollout(1, 2, 4))

    assert reply.scores[0].status == ERROR
    assert await stand.handlers.ready() == (False, "half a model")
    assert stand.value("ready") == 0


async def test_a_load_that_fails_half_way_makes_the_server_not_ready(tmp_path: Path) -> None:
    class HalfWay(FakeEngine):
        async def load_weights(self, directory: Path, policy_version: int) -> None:
            raise EngineUnhealthy("half a model")

    stand = Stand(HalfWay(), root=tmp_path)
    with pytest.raises(NotReady, match="half a model"):
        await stand.handlers.load_policy(publish_version(tmp_path, 2))

    assert not (await stand.handlers.ready())[0]
    with pytest.raises(NotReady, match="half a model"):
        await stand.score(rollout(1, 2, 4))


async def test_a_request_with_too_many_bytes_is_refused() -> None:
    with pytest.raises(RequestTooLarge, match="exceed the limit max_request_bytes=10"):
        await Stand(max_request_bytes=10).score(rollout(1, 2, 4))


async def test_a_key_makes_a_retry_free() -> None:
    stand = Stand()
    request = pb.ScoreTurnsRequest(rollouts=[rollout(1, 2, 4)], idempotency_key="k")

    first = await stand.handlers.score_turns(request, 5.0)
    again = await stand.handlers.score_turns(request, 5.0)

    assert first == again
    assert stand.value("tokens_total", kind="computed") == 3
    assert stand.value("replies_bytes") == first.ByteSize() + 1 + 512


async def test_calls_are_counted_by_outcome() -> None:
    stand = Stand()
    await stand.score(rollout(1, 2, 4))
    with pytest.raises(InvalidRequest):
        await stand.score()

    assert stand.value("requests_total", method="ScoreTurns", status="OK") == 1
    assert stand.value("requests_total", method="ScoreTurns", status="InvalidRequest") == 1


async def test_a_server_without_a_model_has_no_tokenizer() -> None:
    with pytest.raises(InvalidRequest, match="send token ids"):
        await Stand().handlers.tokenizer()


@pytest.mark.slow  # imports transformers
async def test_a_model_without_a_tokenizer_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')

    with pytest.raises(InvalidRequest, match="this model has no tokenizer") as error:
        await TokenizerSource(tmp_path).get()
    assert "\n" not in str(error.value)
