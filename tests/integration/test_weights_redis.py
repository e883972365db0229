"""Publish, announce and watch over a real Redis, with processes that are killed on the way."""

import asyncio
import logging
import random
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import pytest

from services.reward_server.engines.fake_engine import FakeEngine
from services.reward_server.policy import PolicyManager
from tests.redis_server import RedisServer
from turnwise.errors import InvalidInput, TurnwiseError
from turnwise.weights import (
    Announcement,
    announce,
    announced,
    fence_key,
    locate,
    policy_key,
    publish,
    published_versions,
    verify,
    watch,
)

SHARDS, KILLS, RACED = 3, 10, 30

# Waits for a line with its first version, then publishes and announces until it is killed.
PUBLISHER = f"""
import sys
from itertools import count
from pathlib import Path
from redis import Redis
from turnwise.weights import announce, publish

def write(directory):
    for shard in range({SHARDS}):
        (directory / f"{{shard}}.safetensors").write_bytes(b"%8d" % version * 20_000)

root, client = Path(sys.argv[1]), Redis.from_url(sys.argv[2])
client.ping()
print("ready", flush=True)
for version in count(int(input())):
    announce(client, "demo", publish(root, "demo", version, write))
"""

# Waits for a line, then tries to publish content of its own under each of the same versions.
RACER = f"""
import sys, time
from pathlib import Path
from turnwise.errors import InvalidInput, TurnwiseError
from turnwise.weights import publish

def write(directory):
    for shard in range({SHARDS}):
        (directory / f"{{shard}}.safetensors").write_text(sys.argv[2])

print("ready", flush=True)
input()
version = 0
while version < {RACED}:
    try:
        publish(Path(sys.argv[1]), "demo", version, write)
        print(version)
    except InvalidInput as error:
        assert "is there already and differs" in str(error), error
    except TurnwiseError as error:
        assert "another process is publishing there" in str(error), error
        time.sleep(0.001)
        continue
    version += 1
"""

ANNOUNCER = """
import random, sys
from redis import Redis
from turnwise.errors import InvalidInput
from turnwise.weights import Announcement, announce

client, versions = Redis.from_url(sys.argv[1]), list(range(1, 301))
random.Random(int(sys.argv[2])).shuffle(versions)
for version in versions:
    try:
        announce(client, "demo", Announcement(version, f"demo/v{version:08}", "0" * 64))
        print(version)
    except InvalidInput:
        pass
"""


def an(version: int, digit: str = "0") -> Announcement:
    return Announcement(version, f"demo/v{version:08}", digit * 64)


def start(script: str, *arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", script, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def say(process: "subprocess.Popen[str]", line: str) -> None:
    """Wait until the process is ready, and let it go on."""
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.write(line)
    process.stdin.flush()


def write_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"weights")


@pytest.mark.slow
def test_a_publisher_killed_at_any_moment_leaves_whole_versions_only(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    root, client, delay_s = tmp_path / "weights", redis_server.client(), random.Random(0)
    publishers = [start(PUBLISHER, root, redis_server.url) for _ in range(KILLS)]
    held = newest = 0
    for publisher in publishers:
        # It goes on after the announced version, as a trainer would: one that was published and
        # not announced comes again, so publishing the same content again must do.
        say(publisher, f"{held + 1}\n")
        time.sleep(delay_s.uniform(0.0, 0.15))
        publisher.kill()
        assert publisher.communicate()[1] == ""

        versions = published_versions(root, "demo")
        assert versions == list(range(1, len(versions) + 1))
        assert len(versions) >= newest
        for version in versions[newest:]:
            directory = root / "demo" / f"v{version:08}"
            assert verify(directory).version == version
            for shard in range(SHARDS):
                content = (directory / f"{shard}.safetensors").read_bytes()
                assert content == b"%8d" % version * 20_000
        newest = len(versions)
        if (now := announced(client, "demo")) is not None:
            verify(locate(root, now.path), now.manifest_sha256)
            assert held <= now.version <= newest <= now.version + 1
            held = now.version
    assert held > 0


@pytest.mark.slow
def test_two_publishers_at_once_never_make_a_mixed_version(tmp_path: Path) -> None:
    racers = {name: start(RACER, tmp_path, name) for name in ("one", "two")}
    for racer in racers.values():
        say(racer, "go\n")
    printed = {name: racer.communicate() for name, racer in racers.items()}
    owned = [(int(line), name) for name in racers for line in printed[name][0].split()]

    assert [printed[name][1] for name in racers] == ["", ""]
    assert [version for version, _ in sorted(owned)] == list(range(RACED))  # each once
    assert published_versions(tmp_path, "demo") == list(range(RACED))
    for version, name in owned:
        directory = tmp_path / "demo" / f"v{version:08}"
        assert verify(directory).version == version
        shards = {(directory / f"{shard}.safetensors").read_text() for shard in range(SHARDS)}
        assert shards == {name}


def test_the_key_never_goes_back_when_two_processes_race(redis_server: RedisServer) -> None:
    client = redis_server.client()
    racers = [start(ANNOUNCER, redis_server.url, seed) for seed in (1, 2)]
    seen = [0]
    while any(racer.poll() is None for racer in racers):
        if (now := announced(client, "demo")) is not None:
            seen.append(now.version)
    taken = [[int(line) for line in racer.communicate()[0].split()] for racer in racers]

    assert [racer.returncode for racer in racers] == [0, 0]
    assert seen == sorted(seen)
    assert announced(client, "demo") == an(300)
    for versions in taken:
        assert versions == sorted(versions)
    assert len(set(seen)) > 2


def test_an_announcement_is_repeated_freely_and_refused_when_not_newer(
    redis_server: RedisServer,
) -> None:
    client = redis_server.client()
    assert announced(client, "demo") is None
    announce(client, "demo", an(5))
    announce(client, "demo", an(5))
    for other in (an(4), an(5, "1")):
        with pytest.raises(InvalidInput, match=r'demo:policy: cannot move to .*"version":5'):
            announce(client, "demo", other)
    announce(client, "other", an(1))

    assert announced(client, "demo") == an(5)
    assert client.get(policy_key("demo")) == (
        b'{"version":5,"path":"demo/v00000005","manifest_sha256":"%s"}' % (b"0" * 64)
    )


def test_an_older_fencing_token_cannot_move_the_key(redis_server: RedisServer) -> None:
    client = redis_server.client()
    announce(client, "demo", an(1), fence=4)
    client.incr(fence_key("demo"))  # another trainer took the lease and announced nothing yet

    for fence in (4, 0):
        with pytest.raises(TurnwiseError, match=f"token {fence} is older than the newest, 5"):
            announce(client, "demo", an(2), fence)
    assert announced(client, "demo") == an(1)
    announce(client, "demo", an(2), fence=5)
    assert announced(client, "demo") == an(2)


async def following(announcements: AsyncGenerator[Announcement, None]) -> Announcement:
    return await asyncio.wait_for(anext(announcements), 20)


async def test_a_watcher_sees_the_newest_at_once_and_skips_those_between(
    redis_server: RedisServer,
) -> None:
    client = redis_server.client()
    announce(client, "demo", an(1))
    async with aclosing(watch(redis_server.url, "demo", poll_s=60)) as announcements:
        assert await following(announcements) == an(1)
        for version in range(2, 41):
            announce(client, "demo", an(version))
        assert await following(announcements) == an(40)

        waiting = asyncio.create_task(following(announcements))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        began = time.monotonic()
        announce(client, "demo", an(41))
        assert await waiting == an(41)
        assert time.monotonic() - began < 1  # by the message: a poll would come after 60 s


async def test_a_watcher_finds_by_polling_what_no_message_told(redis_server: RedisServer) -> None:
    client = redis_server.client()
    async with aclosing(watch(redis_server.url, "demo", poll_s=0.05)) as announcements:
        waiting = asyncio.create_task(following(announcements))
        await asyncio.sleep(0.2)
        client.set(policy_key("demo"), b'{"version": "broken"}')  # passed over
        await asyncio.sleep(0.2)
        client.set(policy_key("demo"), b'{"version":3,"path":"x","manifest_sha256":"%064d"}' % 0)
        assert await waiting == Announcement(3, "x", "0" * 64)


async def test_a_watcher_outlives_a_killed_redis_and_never_blocks_the_loop(
    redis_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    announce(redis_server.client(), "demo", an(1))
    async with aclosing(watch(redis_server.url, "demo", poll_s=60)) as announcements:
        assert await following(announcements) == an(1)
        waiting = asyncio.create_task(following(announcements))
        redis_server.kill()
        gaps_s = []
        for _ in range(100):
            began = time.monotonic()
            await asyncio.sleep(0.01)
            gaps_s.append(time.monotonic() - began)
        assert not waiting.done()
        await asyncio.to_thread(redis_server.start)
        assert announced(redis_server.client(), "demo") == an(1)  # the AOF brought it back
        announce(redis_server.client(), "demo", an(2))
        assert await waiting == an(2)

    assert max(gaps_s) < 0.5
    lost = [r for r in caplog.records if r.getMessage() == "policy watch lost redis"]
    assert [record.levelno for record in lost] == [logging.WARNING]


async def test_a_watcher_waits_for_a_redis_that_is_not_there_yet(redis_server: RedisServer) -> None:
    redis_server.kill()
    async with aclosing(watch(redis_server.url, "demo", poll_s=60)) as announcements:
        waiting = asyncio.create_task(following(announcements))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(redis_server.start)
        announce(redis_server.client(), "demo", an(1))
        assert await waiting == an(1)


class NoMetrics:
    def observe_load(self, seconds: float) -> None: ...

    def count_failure(self) -> None: ...


async def test_what_a_trainer_announces_is_served(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    client, root = redis_server.client(), tmp_path / "weights"
    manager = PolicyManager(FakeEngine(), root, NoMetrics())
    watcher = asyncio.create_task(manager.run_watcher(watch(redis_server.url, "demo", poll_s=60)))
    loop = asyncio.get_running_loop()

    for version in (1, 2):
        announce(client, "demo", publish(root, "demo", version, write_weights))
        assert await manager.wait_for(version, loop.time() + 20)
    broken = publish(root, "demo", 3, write_weights)
    (root / broken.path / "config.json").write_text("{}")
    announce(client, "demo", broken)
    assert not await manager.wait_for(3, loop.time() + 0.3)
    assert (manager.version, manager.healthy) == (2, True)
    announce(client, "demo", publish(root, "demo", 4, write_weights))
    assert await manager.wait_for(4, loop.time() + 20)

    watcher.cancel()
    await asyncio.wait([watcher])
    await manager.close()
