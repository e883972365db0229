"""The reward server over gRPC: a real process over the fake engine, whose numbers are by hand."""

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import grpc_tools
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_tools import protoc

from tests.reward_process import (
    ROOT,
    Faults,
    Server,
    environment,
    policies,
    request,
    reward_server,
    rewards,
    rollout,
    scores,
)
from turnwise.v1 import reward_pb2 as pb
from turnwise.v1 import reward_pb2_grpc

POISON, RAISE = 66, 77

SERVICES = ("turnwise.v1.RewardService", "turnwise.v1.PolicyService")

OK = pb.ROLLOUT_STATUS_OK


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """One server for all tests that leave it as it was."""
    faults = Faults(poison_id=POISON, raise_id=RAISE)
    limits = {"TURNWISE_REWARD_SERVER__LIMITS__MAX_QUEUED_TOKENS": "50000"}
    with reward_server(faults=faults, variables=limits) as running:
        yield running


@pytest.fixture
async def stub(server: Server) -> AsyncIterator["reward_pb2_grpc.RewardServiceAsyncStub"]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield rewards(channel)


CLIENT = """
import grpc, sys
from turnwise.v1 import reward_pb2 as pb, reward_pb2_grpc
assert pb.__file__.startswith(sys.argv[2]), pb.__file__
stub = reward_pb2_grpc.RewardServiceStub(grpc.insecure_channel(sys.argv[1]))
rollout = pb.Rollout(token_ids=[1, 2, 4], prefix_ends=[1, 3], answers=[pb.Answer(token_ids=[5])])
reply = stub.ScoreTurns(pb.ScoreTurnsRequest(rollouts=[rollout]), timeout=10)
print([prefix.score for prefix in reply.scores[0].prefixes])
"""


def test_a_client_made_from_the_proto_alone_can_score(server: Server, tmp_path: Path) -> None:
    arguments = ["protoc", f"-I{ROOT / 'proto'}", f"--python_out={tmp_path}"]
    arguments += [f"-I{Path(grpc_tools.__file__).parent / '_proto'}"]
    arguments += [f"--grpc_python_out={tmp_path}", "turnwise/v1/reward.proto"]
    assert protoc.main(arguments) == 0
    for package in ("turnwise", "turnwise/v1"):
        (tmp_path / package / "__init__.py").touch()

    done = subprocess.run(
        [sys.executable, "-c", CLIENT, server.address, str(tmp_path)],
        check=False,
        env=environment(PYTHONPATH=str(tmp_path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert done.stdout == "[-0.7, -0.3]\n", done.stderr  # worked out in test_handlers.py


def test_reflection_lists_and_describes_every_service(server: Server) -> None:
    with grpc.insecure_channel(server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)

        assert set(database.get_services()) == {
            *SERVICES,
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        file = database.FindFileContainingSymbol(SERVICES[0])
        assert [service.name for service in file.service] == ["RewardService", "PolicyService"]


async def test_info_says_what_is_served(stub: "reward_pb2_grpc.RewardServiceAsyncStub") -> None:
    info = await stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=10)

    assert (info.engine, info.route, info.vocab_size) == ("fake", "fake", 100)
    assert info.limits.max_queued_tokens == 50_000
    assert info.limits.max_request_bytes == 64 << 20


async def test_a_session_over_the_wire(stub: "reward_pb2_grpc.RewardServiceAsyncStub") -> None:
    session = stub.ScoreSession(timeout=10)
    opened = pb.SessionOpen(token_ids=[1], answers=[pb.Answer(token_ids=[5])])
    replies = []
    for step in (
        pb.ScoreSessionRequest(open=opened),
        pb.ScoreSessionRequest(extend=pb.SessionExtend(token_ids=[2, 4])),
        pb.ScoreSessionRequest(close=pb.SessionClose()),
    ):
        await session.write(step)
        replies.append(cast(pb.ScoreSessionResponse, await session.read()))

    assert [[p.score for p in reply.score.prefixes] for reply in replies] == [
        [-0.7],
        [-0.3],
        [-0.7, -0.3],
    ]
    assert await session.read() == grpc.aio.EOF
    assert await session.code() == grpc.StatusCode.OK


async def test_sampling_streams_many_prompts(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = policies(channel).Sample(
            pb.SampleRequest(
                prompts=[pb.SamplePrompt(token_ids=[1, 2]), pb.SamplePrompt(token_ids=[7])],
                params=pb.SamplingParams(n=2, max_tokens=2),
            ),
            timeout=10,
        )
        tokens: dict[tuple[int, int], list[int]] = {}
        async for r in call:
            tokens.setdefault((r.prompt_index, r.sequence_index), []).extend(r.token_ids)

    assert tokens == {(0, 0): [3, 6], (0, 1): [4, 8], (1, 0): [7, 14], (1, 1): [8, 16]}


async def test_a_bad_rollout_among_a_hundred_leaves_99_ok(
    stub: "reward_pb2_grpc.RewardServiceAsyncStub",
) -> None:
    rollouts = [rollout(i % 50, 2, 4) for i in range(100)]
    rollouts[17] = rollout(POISON, 2, 4)

    reply = await stub.ScoreTurns(request(*rollouts), timeout=10)

    assert [i for i, score in enumerate(reply.scores) if score.status != OK] == [17]
    assert reply.scores[17].reason == "token 66 is poison"


async def test_an_engine_that_raises_is_an_error_and_serves_on(
    stub: "reward_pb2_grpc.RewardServiceAsyncStub",
) -> None:
    reply = await stub.ScoreTurns(request(rollout(RAISE, 2, 4)), timeout=10)

    assert reply.scores[0].status == pb.ROLLOUT_STATUS_ERROR
    assert reply.scores[0].reason == "the engine failed: the engine raised"
    assert scores(await stub.ScoreTurns(request(), timeout=10)) == [-0.7, -0.3]


async def test_a_refusal_names_field_and_limit(
    stub: "reward_pb2_grpc.RewardServiceAsyncStub",
) -> None:
    call = stub.ScoreTurns(pb.ScoreTurnsRequest(), timeout=10)

    assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert await call.details() == "rollouts: is empty"


async def test_bytes_that_are_no_request_harm_nobody(server: Server) -> None:
    draw = random.Random(0)
    good = request().SerializeToString()
    method = "/turnwise.v1.RewardService/ScoreTurns"
    codes, lines = set(), len(server.lines)
    async with grpc.aio.insecure_channel(server.address) as channel:
        send: Any = channel.unary_unary(method)
        for _ in range(300):
            data = bytearray(good if draw.random() < 0.7 else draw.randbytes(40))
            for _ in range(draw.randint(1, 4)):
                data[draw.randrange(len(data))] = draw.randrange(256)
            call = send(bytes(data), timeout=10)
            codes.add(await call.code())
        unknown: Any = channel.unary_unary("/turnwise.v1.RewardService/NoSuchCall")
        assert await unknown(b"").code() == grpc.StatusCode.UNIMPLEMENTED
        stub = rewards(channel)

        assert scores(await stub.ScoreTurns(request(), timeout=10)) == [-0.7, -0.3]

    assert codes == {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
    assert not any("Traceback" in line for line in server.lines[lines:])


async def test_a_thousand_small_requests_at_once(
    stub: "reward_pb2_grpc.RewardServiceAsyncStub",
) -> None:
    requests = [request(rollout(i % 50, 2, 4)) for i in range(1000)]

    replies = await asyncio.gather(*[stub.ScoreTurns(r, timeout=60) for r in requests])

    for i, reply in enumerate(replies):
        # -(1 + (first + 5) % 10) / 10, then the same with all three ids before the answer.
        first = i % 50
        assert scores(reply) == [
            pytest.approx(-(1 + (first + 5) % 10) / 10),
            pytest.approx(-(1 + (first + 11) % 10) / 10),
        ]


async def test_an_oversized_request_is_refused_or_served_in_part_and_others_go_on(
    server: Server, stub: "reward_pb2_grpc.RewardServiceAsyncStub"
) -> None:
    # 1,000 rollouts of 5,000 tokens that differ in their first token: 100 queues full.
    huge = [rollout(i % 100, *[2] * 4999, ends=(5000,)) for i in range(1000)]
    for i, r in enumerate(huge):
        r.token_ids[1] = i // 100
    reply, small = await asyncio.gather(
        stub.ScoreTurns(request(*huge), timeout=60), stub.ScoreTurns(request(), timeout=60)
    )

    statuses = [score.status for score in reply.scores]
    assert statuses.count(OK) in (9, 10)
    assert set(statuses) == {OK, pb.ROLLOUT_STATUS_OVERLOADED}
    assert scores(small) == [-0.7, -0.3]
    too_long = pb.ScoreTurnsRequest(idempotency_key="k" * ((64 << 20) + 1))
    call = stub.ScoreTurns(too_long, timeout=60)
    assert await call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in await call.details()


async def test_expired_and_cancelled_calls_free_the_queue() -> None:
    # 100 tokens take a second.
    with reward_server(faults=Faults(seconds_per_token=0.01)) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = rewards(channel)
            long = request(rollout(*[1] * 100, ends=(100,)))
            running = stub.ScoreTurns(long, timeout=60)
            await asyncio.sleep(0.2)
            waiting = [stub.ScoreTurns(long, timeout=60) for _ in range(20)]
            late = await stub.ScoreTurns(request(), timeout=0.3)
            for call in (*waiting, running):
                call.cancel()
            await asyncio.sleep(0.1)
            began = time.monotonic()
            reply = await stub.ScoreTurns(request(), timeout=10)

    assert late.scores[0].status == pb.ROLLOUT_STATUS_DEADLINE
    assert scores(reply) == [-0.7, -0.3]
    assert time.monotonic() - began < 0.5


async def test_a_full_queue_says_when_to_come_back() -> None:
    limit = {"TURNWISE_REWARD_SERVER__LIMITS__MAX_QUEUED_TOKENS": "150"}
    with reward_server(faults=Faults(seconds_per_token=0.01), variables=limit) as server:
        async with grpc.aio.insecure_channel(server.address) as channel:
            stub = rewards(channel)
            long = request(rollout(*[1] * 100, ends=(100,)))
            calls = []
            for _ in range(2):  # one in the engine, one in the queue
                calls.append(stub.ScoreTurns(long, timeout=60))
                await asyncio.sleep(0.2)
            refused = stub.ScoreTurns(long, timeout=60)

            assert await refused.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert 50 <= int(dict(await refused.trailing_metadata())["retry-after-ms"]) <= 30_000
            for call in calls:
                assert (await call).scores[0].status == OK
