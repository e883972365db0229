"""The life of a reward server process: it starts, drains and exits as a supervisor expects."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest

from tests.reward_process import (
    ROOT,
    Faults,
    health,
    refusal,
    request,
    reward_server,
    rollout,
)
from turnwise.v1 import reward_pb2 as pb
from turnwise.v1 import reward_pb2_grpc

SERVICES = ("turnwise.v1.RewardService", "turnwise.v1.PolicyService")


def test_health_is_told_per_service_and_not_serving_while_loading() -> None:
    with (
        reward_server(faults=Faults(load_s=1.5), wait=False) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        loading = [health(channel, service) for service in ("", *SERVICES)]
        with pytest.raises(grpc.RpcError) as refusal:
            reward_pb2_grpc.RewardServiceStub(channel).ScoreTurns(request(), timeout=10)
        server.wait_for_event("serving")

        assert loading == ["NOT_SERVING"] * 3
        assert refusal.value.code() == grpc.StatusCode.UNAVAILABLE
        assert refusal.value.details() == "loading the model"
        assert [health(channel, service) for service in ("", *SERVICES)] == ["SERVING"] * 3


def test_a_signal_while_loading_ends_the_process_at_once() -> None:
    with reward_server(faults=Faults(load_s=60.0), wait=False) as server:
        server.terminate()

        assert server.wait(5) == 0


def test_sigterm_finishes_what_is_under_way_and_exits_0() -> None:
    with (
        reward_server(faults=Faults(seconds_per_token=0.01)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        call = stub.ScoreTurns.future(request(rollout(*[1] * 100, ends=(100,))), timeout=10)
        time.sleep(0.3)
        server.terminate()
        server.wait_for_event("draining")
        with pytest.raises(grpc.RpcError) as refusal:
            stub.ScoreTurns(request(), timeout=5)

        assert refusal.value.code() == grpc.StatusCode.UNAVAILABLE
        assert health(channel) == "NOT_SERVING"
        assert call.result().scores[0].status == pb.ROLLOUT_STATUS_OK
        assert server.wait() == 0
        assert server.events()[-1]["event"] == "stopped"


def test_a_drain_has_an_end_and_a_second_sigterm_is_one() -> None:
    long = request(rollout(*[1] * 3000, ends=(3000,)))  # 30 s
    slow = Faults(seconds_per_token=0.01)
    with (
        reward_server(faults=slow, variables={"TURNWISE_REWARD_SERVER__DRAIN_S": "0.3"}) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        call = reward_pb2_grpc.RewardServiceStub(channel).ScoreTurns.future(long, timeout=60)
        time.sleep(0.3)
        server.terminate()
        assert server.wait(8) == 0
        with pytest.raises(grpc.RpcError):
            call.result()
    with (
        reward_server(faults=slow) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        reward_pb2_grpc.RewardServiceStub(channel).ScoreTurns.future(long, timeout=60)
        time.sleep(0.3)
        server.terminate()
        server.wait_for_event("draining")
        server.terminate()
        assert server.wait(2) == 128 + signal.SIGTERM


def test_a_taken_port_is_one_clear_line_and_exit_2(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for option, other in (("--port", "--http-port"), ("--http-port", "--port")):
            line = refusal("--engine", "fake", option, port, other, "0")
            assert line.startswith(f"reward_server: error: port 127.0.0.1:{port}: cannot be opened")


def test_a_wrong_model_path_is_one_clear_line_and_exit_2(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    assert refusal("--model", nowhere).endswith(f"model path {nowhere}: is no directory")
    assert refusal("--model", str(tmp_path)).endswith(": holds no config.json")


@pytest.mark.slow  # loads torch
def test_a_model_that_cannot_be_loaded_is_one_clear_line_and_exit_2(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')

    line = refusal("--model", str(tmp_path), "--port", "0", "--http-port", "0")

    assert f"model path {tmp_path}: engine torch cannot serve it:" in line


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    check = (
        "import sys; from services.reward_server.__main__ import main; main(['--help']);"
        "assert not {'torch', 'grpc', 'pydantic', 'fastapi'} & set(sys.modules)"
    )
    began = time.monotonic()

    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    assert time.monotonic() - began < 2.0  # half a second where nothing else runs


def test_no_secret_is_logged() -> None:
    secret = "s3cr3t-t0ken"
    with reward_server("--log-level", "debug", variables={"TURNWISE_API_TOKEN": secret}) as server:
        with grpc.insecure_channel(server.address) as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)
            metadata = (("authorization", f"Bearer {secret}"),)
            stub.ScoreTurns(request(), timeout=10, metadata=metadata)
        server.terminate()
        server.wait()

    assert not any(secret in line for line in server.lines)
