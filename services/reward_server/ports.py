"""Open both ports: a gRPC server and an HTTP server, with TLS and a token where asked for."""

import socket
import ssl
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import grpc
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.reward_server.auth import App, GrpcAuth, HttpAuth
from services.reward_server.decoding import DecodeGuard
from services.reward_server.handlers import Handlers
from services.reward_server.servicer import PolicyServicer, RewardServicer
from services.reward_server.settings import ServerSection
from turnwise.errors import TurnwiseError
from turnwise.v1 import reward_pb2, reward_pb2_grpc

SERVICES = tuple(service.full_name for service in reward_pb2.DESCRIPTOR.services_by_name.values())


class HttpServer(uvicorn.Server):
    """Leaves the signals to the process."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class Ports(NamedTuple):
    grpc: grpc.aio.Server
    health: health.aio.HealthServicer
    http: HttpServer
    http_socket: socket.socket
    port: int
    http_port: int


class Tls(NamedTuple):
    cert: Path
    key: Path
    client_ca: Path | None


def read_tls(settings: ServerSection) -> Tls | None:
    """Check the files as OpenSSL would read them; TurnwiseError names the one that is bad."""
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    files = f"TLS certificate {settings.tls_cert} with key {settings.tls_key}"
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
        if settings.tls_client_ca is not None:
            files = f"TLS client CA {settings.tls_client_ca}"
            context.load_verify_locations(settings.tls_client_ca)
    except (OSError, ssl.SSLError) as error:
        raise TurnwiseError(f"{files}: cannot be read: {error.strerror or error}") from error
    return Tls(settings.tls_cert, settings.tls_key, settings.tls_client_ca)


async def open_ports(
    settings: ServerSection, handlers: Handlers, app: App, token: str | None
) -> Ports:
    """Both ports answer from now on: health says NOT_SERVING until somebody says otherwise."""
    tls = read_tls(settings)
    http_socket = _bind(settings.host, settings.http_port)
    try:
        server, checker, port = await _open_grpc(settings, handlers, token, tls)
    except BaseException:
        http_socket.close()
        raise
    http = HttpServer(_http_config(HttpAuth(app, token) if token else app, tls))
    return Ports(server, checker, http, http_socket, port, http_socket.getsockname()[1])


async def _open_grpc(
    settings: ServerSection, handlers: Handlers, token: str | None, tls: Tls | None
) -> tuple[grpc.aio.Server, health.aio.HealthServicer, int]:
    options = [
        ("grpc.so_reuseport", 0),  # else a second server would quietly share the port
        ("grpc.max_receive_message_length", settings.limits.max_request_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", 60_000),  # finds connections that are half open
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    interceptors: list[grpc.aio.ServerInterceptor] = [GrpcAuth(token)] if token else []
    interceptors.append(DecodeGuard())
    server = grpc.aio.server(interceptors=interceptors, options=options)
    reward_pb2_grpc.add_RewardServiceServicer_to_server(RewardServicer(handlers), server)
    reward_pb2_grpc.add_PolicyServiceServicer_to_server(PolicyServicer(handlers), server)
    checker = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    reflection.enable_server_reflection(
        (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    await set_health(checker, serving=False)
    place = address(settings.host, settings.port)
    try:
        if tls is None:
            port = server.add_insecure_port(place)
        else:
            port = server.add_secure_port(place, _credentials(tls))
    except RuntimeError as error:
        raise TurnwiseError(f"port {place}: cannot be opened, is it taken?") from error
    await server.start()
    return server, checker, port


async def set_health(checker: health.aio.HealthServicer, *, serving: bool) -> None:
    status = health_pb2.HealthCheckResponse
    for service in ("", *SERVICES):
        await checker.set(service, status.SERVING if serving else status.NOT_SERVING)


def _credentials(tls: Tls) -> grpc.ServerCredentials:
    pair = (tls.key.read_bytes(), tls.cert.read_bytes())
    roots = tls.client_ca.read_bytes() if tls.client_ca else None
    return grpc.ssl_server_credentials([pair], roots, require_client_auth=roots is not None)


def _http_config(app: App, tls: Tls | None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=1,  # the drain came before
        ssl_certfile=tls.cert if tls else None,
        ssl_keyfile=tls.key if tls else None,
        ssl_ca_certs=str(tls.client_ca) if tls and tls.client_ca else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if tls and tls.client_ca else ssl.CERT_NONE,
    )


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen()
    except OSError as error:
        sock.close()
        place = address(host, port)
        raise TurnwiseError(f"port {place}: cannot be opened: {error.strerror}") from error
    return sock


def address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
