"""The bearer token, asked for at both front doors and compared in constant time."""

import hmac
import json
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from services.reward_server.errors import STATUS, Unauthenticated

# Probes and load balancers carry no token; the pages tell the interface and nothing else.
OPEN_METHODS = ("/grpc.health.v1.Health/",)
OPEN_PATHS = ("/healthz", "/readyz", "/docs", "/openapi.json")
PROBLEM = "the bearer token is missing or wrong"

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def is_allowed(token: str, header: str | bytes) -> bool:
    """Whether an authorization header carries the token; takes as long whatever it says."""
    given = header if isinstance(header, bytes) else header.encode()
    scheme, _, credentials = given.partition(b" ")
    same = hmac.compare_digest(credentials.strip(), token.encode())
    return same and scheme.lower() == b"bearer"


class GrpcAuth(grpc.aio.ServerInterceptor):
    def __init__(self, token: str) -> None:
        self._token = token
        self._refusal: Any = grpc.stream_stream_rpc_method_handler(_refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        metadata = dict(handler_call_details.invocation_metadata or ())
        open_to_all = handler_call_details.method.startswith(OPEN_METHODS)
        if open_to_all or is_allowed(self._token, metadata.get("authorization", "")):
            return await continuation(handler_call_details)
        return self._refusal


async def _refuse(_requests: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(STATUS[Unauthenticated].grpc, PROBLEM)


class HttpAuth:
    """An ASGI app around another one."""

    def __init__(self, app: App, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers", ()))
        if (
            scope["type"] == "lifespan"
            or scope.get("path") in OPEN_PATHS
            or is_allowed(self._token, headers.get(b"authorization", b""))
        ):
            await self._app(scope, receive, send)
            return
        body = json.dumps({"detail": PROBLEM}).encode()
        lines = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"www-authenticate", b"Bearer"),
        ]
        status = STATUS[Unauthenticated].http
        await send({"type": "http.response.start", "status": status, "headers": lines})
        await send({"type": "http.response.body", "body": body})
