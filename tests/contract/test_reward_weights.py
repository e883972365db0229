"""The reward server follows what a trainer announces in a real Redis."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.redis_server import RedisServer
from tests.reward_process import request, reward_server, scores
from turnwise.v1 import reward_pb2 as pb
from turnwise.v1 import reward_pb2_grpc
from turnwise.weights import Announcement, announce, publish


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


def publish_version(root: Path, version: int) -> Announcement:
    def write(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"%d" % version)

    return publish(root, "demo", version, write)


def test_an_announced_version_is_served_and_a_broken_one_is_not(
    tmp_path: Path, redis: RedisServer
) -> None:
    root = tmp_path / "weights"
    flags = ("--run", "demo", "--weights-root", str(root))
    with (
        redis.client() as client,
        reward_server(*flags, variables={"TURNWISE_REDIS_URL": redis.url}) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        announce(client, "demo", publish_version(root, 1))
        server.wait_for_event("policy loaded")
        broken = publish_version(root, 2)
        (root / broken.path / "model.safetensors").write_bytes(b"not 2")
        announce(client, "demo", broken)
        server.wait_for_event("policy not loaded")
        served = stub.ScoreTurns(request(), timeout=10)
        announce(client, "demo", publish_version(root, 3))
        wanted = request()
        wanted.options.min_policy_version = 3
        waited = stub.ScoreTurns(wanted, timeout=10)

    # Version 0 gives -0.7 and -0.3; each version adds 1 to the sums.
    assert (served.policy_version, scores(served)) == (1, [-0.8, -0.4])
    assert (waited.policy_version, scores(waited)) == (3, [-1.0, -0.6])
    assert waited.scores[0].status == pb.ROLLOUT_STATUS_OK
