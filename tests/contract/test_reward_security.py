"""Who gets in: bearer token, TLS and mTLS, at both ports of a real server process."""

import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.reward_process import Server, health, refusal, request, reward_server, scores
from turnwise.v1 import reward_pb2 as pb
from turnwise.v1 import reward_pb2_grpc

TOKEN = "s3cret"
BEARER = f"Bearer {TOKEN}"


@pytest.fixture(scope="module")
def guarded() -> Iterator[Server]:
    with reward_server(variables={"TURNWISE_API_TOKEN": TOKEN}) as server:
        yield server


def score(channel: grpc.Channel, *metadata: tuple[str, str]) -> pb.ScoreTurnsResponse:
    stub = reward_pb2_grpc.RewardServiceStub(channel)
    reply: pb.ScoreTurnsResponse = stub.ScoreTurns(request(), timeout=10, metadata=metadata)
    return reply


def http_status(url: str, token: str = "", context: ssl.SSLContext | None = None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    asked = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(asked, timeout=10, context=context) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_grpc_asks_for_the_token(guarded: Server) -> None:
    with grpc.insecure_channel(guarded.address) as channel:
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            with pytest.raises(grpc.RpcError) as error:
                score(channel, *metadata)
            assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
            assert error.value.details() == "the bearer token is missing or wrong"
        assert scores(score(channel, ("authorization", BEARER))) == [-0.7, -0.3]


def test_streams_and_reflection_ask_for_the_token_and_health_does_not(guarded: Server) -> None:
    with grpc.insecure_channel(guarded.address) as channel:
        session = reward_pb2_grpc.RewardServiceStub(channel).ScoreSession(iter([]), timeout=10)
        samples = reward_pb2_grpc.PolicyServiceStub(channel).Sample(pb.SampleRequest(), timeout=10)
        method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
        reflected: Any = channel.stream_stream(method)(iter([]), timeout=10)
        for call in (session, samples, reflected):
            with pytest.raises(grpc.RpcError):
                next(call)
            assert call.code() == grpc.StatusCode.UNAUTHENTICATED
        assert health(channel) == "SERVING"


def test_http_asks_for_the_token(guarded: Server) -> None:
    url = f"http://127.0.0.1:{guarded.http_port}"

    assert http_status(f"{url}/v1/info") == 401
    assert http_status(f"{url}/v1/info", "wrong") == 401
    assert http_status(f"{url}/v1/info", TOKEN) == 200
    assert http_status(f"{url}/healthz") == http_status(f"{url}/readyz") == 200


def test_a_token_is_required_to_listen_beyond_loopback() -> None:
    line = refusal("--engine", "fake", "--host", "0.0.0.0")

    assert line.endswith("host 0.0.0.0 is not loopback: set TURNWISE_API_TOKEN")
    with reward_server("--host", "0.0.0.0", variables={"TURNWISE_API_TOKEN": TOKEN}) as server:
        assert http_status(f"http://127.0.0.1:{server.http_port}/healthz") == 200


class Certificates:
    """A certificate authority, and certificates it signed for 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.openssl("req", "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca")
        for name in ("server", "client"):
            key, signing_request = f"{name}.key", f"{name}.csr"
            self.openssl("req", "-keyout", key, "-out", signing_request, "-subj", f"/CN={name}")
            (folder / "names").write_text("subjectAltName=IP:127.0.0.1")
            sign = ["x509", "-req", "-in", signing_request, "-CA", "ca.pem", "-CAkey", "ca.key"]
            self.openssl(*sign, "-CAcreateserial", "-extfile", "names", "-out", f"{name}.pem")

    def openssl(self, command: str, *arguments: str) -> None:
        key = ["-newkey", "rsa:2048", "-nodes"] if command == "req" else []
        subprocess.run(
            ["openssl", command, *key, *arguments],
            cwd=self.folder,
            check=True,
            capture_output=True,
        )

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def variables(self) -> dict[str, str]:
        return {
            "TURNWISE_REWARD_SERVER__TLS_CERT": self.path("server.pem"),
            "TURNWISE_REWARD_SERVER__TLS_KEY": self.path("server.key"),
        }

    def channel(self, server: Server, with_client: bool = False) -> grpc.Channel:
        pair = (self.read("client.key"), self.read("client.pem")) if with_client else (None, None)
        credentials = grpc.ssl_channel_credentials(self.read("ca.pem"), *pair)
        return grpc.secure_channel(server.address, credentials)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls"))


def test_tls_at_both_ports(certificates: Certificates) -> None:
    with reward_server(variables=certificates.variables()) as server:
        with certificates.channel(server) as channel:
            assert scores(score(channel)) == [-0.7, -0.3]
        with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError):
            score(channel)
        context = ssl.create_default_context(cafile=certificates.path("ca.pem"))
        url = f"https://127.0.0.1:{server.http_port}/healthz"
        assert http_status(url, context=context) == 200
        with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
            http_status(url)


def test_mtls_wants_a_certificate_of_the_client(certificates: Certificates) -> None:
    ca = {"TURNWISE_REWARD_SERVER__TLS_CLIENT_CA": certificates.path("ca.pem")}
    with reward_server(variables=certificates.variables() | ca) as server:
        with certificates.channel(server, with_client=True) as channel:
            assert scores(score(channel)) == [-0.7, -0.3]
        with certificates.channel(server) as channel:
            with pytest.raises(grpc.RpcError) as error:
                score(channel)
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        context = ssl.create_default_context(cafile=certificates.path("ca.pem"))
        url = f"https://127.0.0.1:{server.http_port}/healthz"
        with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
            http_status(url, context=context)
        context.load_cert_chain(certificates.path("client.pem"), certificates.path("client.key"))
        assert http_status(url, context=context) == 200


def test_a_bad_tls_file_is_one_clear_line_and_exit_2(certificates: Certificates) -> None:
    variables = certificates.variables()
    variables["TURNWISE_REWARD_SERVER__TLS_KEY"] = certificates.path("client.key")

    line = refusal("--engine", "fake", "--port", "0", "--http-port", "0", **variables)

    assert certificates.path("server.pem") in line
    assert "cannot be read" in line
    variables["TURNWISE_REWARD_SERVER__TLS_KEY"] = certificates.path("nowhere.key")
    line = refusal("--engine", "fake", "--port", "0", "--http-port", "0", **variables)
    assert line.endswith("cannot be read: No such file or directory")
