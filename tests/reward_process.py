"""A real reward server in a process of its own, for tests of the wire.

`python -m tests.reward_process JSON FLAGS...` is the server itself over a fake engine
whose faults JSON names; everything else is what `python -m services.reward_server` does.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import grpc
import msgspec
from grpc_health.v1 import health_pb2

from services.reward_server.engines import Engine, ScoreJob, ScoreResult
from services.reward_server.engines.fake_engine import FakeEngine
from turnwise.v1 import reward_pb2 as pb
from turnwise.v1 import reward_pb2_grpc

ROOT = Path(__file__).parent.parent
START_S = 60.0


class Faults(msgspec.Struct, frozen=True):
    """What the fake engine does beside scoring."""

    load_s: float = 0.0  # to load
    seconds_per_token: float = 0.0
    poison_id: int | None = None  # a job that names it is an error
    raise_id: int | None = None  # a call that names it raises


class FaultyEngine(FakeEngine):
    def __init__(self, faults: Faults) -> None:
        super().__init__(
            poison_id=faults.poison_id,
            seconds_per_token=faults.seconds_per_token,
            max_tokens=100_000,
        )
        self.raise_id = faults.raise_id

    async def score(self, jobs: Sequence[ScoreJob]) -> ScoreResult:
        if any(self.raise_id in job.token_ids for job in jobs):
            raise RuntimeError("the engine raised")
        return await super().score(jobs)


class Server:
    """A running process, its ports and what it logged."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        opened = self.wait_for_event("ports open")
        self.port, self.http_port = int(opened["port"]), int(opened["http_port"])

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines if line.startswith("{")]

    def wait_for_event(self, event: str, within_s: float = START_S) -> dict[str, Any]:
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            for record in self.events():
                if record["event"] == event:
                    return record
            if self.process.poll() is not None:
                break
            time.sleep(0.01)
        raise AssertionError(f"no {event!r}: {self.lines}")

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, within_s: float = 20.0) -> int:
        code = self.process.wait(within_s)
        self._reader.join()
        return code


def environment(**variables: str) -> dict[str, str]:
    """This environment without settings of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TURNWISE_")}
    return kept | variables


@contextmanager
def reward_server(
    *flags: str,
    faults: Faults | None = None,
    wait: bool = True,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Server]:
    """Run a server on free ports: the fake engine, or what flags and variables say."""
    module = ["services.reward_server"]
    if faults is not None:
        module = ["tests.reward_process", msgspec.json.encode(faults).decode()]
    engine = [] if "--model" in flags else ["--engine", "fake"]
    command = [sys.executable, "-m", *module, "--port", "0", "--http-port", "0"]
    command += ["--log-format", "json", *engine, *flags]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(**variables), stderr=subprocess.PIPE, text=True
    )
    try:
        server = Server(process)
        if wait:
            server.wait_for_event("serving")
        yield server
    finally:
        process.kill()
        process.wait()


def health(channel: grpc.Channel, service: str = "") -> str:
    """The name of a service's health status."""
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        health_pb2.HealthCheckRequest.SerializeToString,
        health_pb2.HealthCheckResponse.FromString,
    )
    reply = check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)


def rewards(channel: grpc.aio.Channel) -> "reward_pb2_grpc.RewardServiceAsyncStub":
    """The stub with the types that it has over an aio channel."""
    stub: object = reward_pb2_grpc.RewardServiceStub(channel)
    return cast("reward_pb2_grpc.RewardServiceAsyncStub", stub)


def policies(channel: grpc.aio.Channel) -> "reward_pb2_grpc.PolicyServiceAsyncStub":
    stub: object = reward_pb2_grpc.PolicyServiceStub(channel)
    return cast("reward_pb2_grpc.PolicyServiceAsyncStub", stub)


def rollout(*ids: int, ends: tuple[int, ...] = (1, 3)) -> pb.Rollout:
    return pb.Rollout(token_ids=ids, prefix_ends=ends, answers=[pb.Answer(token_ids=[5])])


def request(*rollouts: pb.Rollout) -> pb.ScoreTurnsRequest:
    return pb.ScoreTurnsRequest(rollouts=rollouts or [rollout(1, 2, 4)])


def scores(reply: pb.ScoreTurnsResponse) -> list[float]:
    return [prefix.score for prefix in reply.scores[0].prefixes]


def refusal(*flags: str, **variables: str) -> str:
    """The one line of a server that cannot serve."""
    command = [sys.executable, "-m", "services.reward_server", *flags]
    done = subprocess.run(
        command,
        check=False,
        env=environment(**variables),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert "Traceback" not in done.stderr
    return line


def main() -> None:
    """Be the server, with a faulty engine."""
    from services.reward_server.__main__ import load_from, make_parser
    from services.reward_server.server import run

    faults = msgspec.json.decode(sys.argv[1], type=Faults)

    async def start(*_: object) -> Engine:
        await asyncio.sleep(faults.load_s)
        return FaultyEngine(faults)

    run(load_from(make_parser().parse_args(sys.argv[2:])), start)


if __name__ == "__main__":
    main()
