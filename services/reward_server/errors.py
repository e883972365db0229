"""Errors that fail a whole call, and the one table of what they are on the wire.

What is wrong with one rollout is a status of that rollout and none of these.
"""

from http import HTTPStatus
from typing import NamedTuple

import grpc

from turnwise.errors import TurnwiseError


class RequestError(TurnwiseError):
    """Base of the errors that end a call; the message is one line for the caller."""


class InvalidRequest(RequestError):
    """The call breaks a rule or a limit; a retry cannot help."""


class RequestTooLarge(RequestError):
    """The request has more bytes than the server reads; send it in parts."""


class Unauthenticated(RequestError):
    """The bearer token is missing or wrong."""


class Overloaded(RequestError):
    """No room now; `retry_after_s` says when to come back."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlinePassed(RequestError):
    """The caller's deadline passed before there was anything to say."""


class NotReady(RequestError):
    """Loading, draining, or unhealthy: another server, or a later try, may do better."""


class EngineFailed(RequestError):
    """The engine broke in a call that has no status per rollout."""


class WireStatus(NamedTuple):
    grpc: grpc.StatusCode
    http: HTTPStatus


# Clients may retry Overloaded and NotReady, never the others.
STATUS: dict[type[RequestError], WireStatus] = {
    InvalidRequest: WireStatus(grpc.StatusCode.INVALID_ARGUMENT, HTTPStatus.BAD_REQUEST),
    RequestTooLarge: WireStatus(
        grpc.StatusCode.INVALID_ARGUMENT, HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    ),
    Unauthenticated: WireStatus(grpc.StatusCode.UNAUTHENTICATED, HTTPStatus.UNAUTHORIZED),
    Overloaded: WireStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, HTTPStatus.TOO_MANY_REQUESTS),
    DeadlinePassed: WireStatus(grpc.StatusCode.DEADLINE_EXCEEDED, HTTPStatus.GATEWAY_TIMEOUT),
    NotReady: WireStatus(grpc.StatusCode.UNAVAILABLE, HTTPStatus.SERVICE_UNAVAILABLE),
    EngineFailed: WireStatus(grpc.StatusCode.INTERNAL, HTTPStatus.INTERNAL_SERVER_ERROR),
}

# Trailing metadata of a gRPC call that was Overloaded; HTTP has the Retry-After header (seconds).
RETRY_AFTER_MS = "retry-after-ms"
