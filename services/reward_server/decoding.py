"""Bytes that are no protobuf message are the caller's mistake, not an exception in the server."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from services.reward_server.errors import InvalidRequest

Message = TypeVar("Message")


class Undecodable:
    """Stands in for a request; grpc would log a traceback and say UNKNOWN."""


class DecodeGuard(grpc.aio.ServerInterceptor):
    """Hands Undecodable on; `decoded` in the servicer then refuses it."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith("/turnwise."):
            return handler
        decode = handler.request_deserializer

        def decode_or_not(data: bytes) -> Any:
            try:
                return decode(data)
            except DecodeError:
                return Undecodable()

        return handler._replace(request_deserializer=decode_or_not)


def decoded(request: Message) -> Message:
    if isinstance(request, Undecodable):
        raise InvalidRequest("the request is not a protobuf message of the kind this call takes")
    return request


async def all_decoded(requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
    async for request in requests:
        yield decoded(request)
