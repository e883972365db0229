"""The gRPC front door: a thin shell around Handlers that tells errors and deadlines."""
# ruff: noqa: N802  the calls are named as on the wire

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc

from services.reward_server.decoding import all_decoded, decoded
from services.reward_server.errors import RETRY_AFTER_MS, STATUS, Overloaded, RequestError
from services.reward_server.handlers import Handlers
from turnwise.v1 import reward_pb2 as pb
from turnwise.v1 import reward_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
# A reply has to be there before the caller's deadline: what is late by then is told as DEADLINE.
REPLY_SHARE, MOST_REPLY_S = 0.1, 0.1


class RewardServicer(reward_pb2_grpc.RewardServiceServicer):
    """ScoreTurns, ScoreSession, GetServerInfo."""

    def __init__(self, handlers: Handlers) -> None:
        self.handlers = handlers

    async def ScoreTurns(
        self, request: pb.ScoreTurnsRequest, context: Context
    ) -> pb.ScoreTurnsResponse:
        async with errors_told(context):
            return await self.handlers.score_turns(
                decoded(request), seconds_left(context), peer(context)
            )
        raise AssertionError

    async def ScoreSession(
        self, requests: AsyncIterator[pb.ScoreSessionRequest], context: Context
    ) -> AsyncIterator[pb.ScoreSessionResponse]:
        async with errors_told(context):
            replies = self.handlers.score_session(
                all_decoded(requests), seconds_left(context), peer(context)
            )
            async with aclosing(replies):
                async for reply in replies:
                    yield reply

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        async with errors_told(context):
            decoded(request)
            return await self.handlers.info()
        raise AssertionError


class PolicyServicer(reward_pb2_grpc.PolicyServiceServicer):
    """Sample, LoadPolicy."""

    def __init__(self, handlers: Handlers) -> None:
        self.handlers = handlers

    async def Sample(
        self, request: pb.SampleRequest, context: Context
    ) -> AsyncIterator[pb.SampleResponse]:
        async with errors_told(context):
            samples = self.handlers.sample(decoded(request), seconds_left(context))
            async with aclosing(samples):
                async for sample in samples:
                    yield sample

    async def LoadPolicy(
        self, request: pb.LoadPolicyRequest, context: Context
    ) -> pb.LoadPolicyResponse:
        async with errors_told(context):
            return await self.handlers.load_policy(decoded(request))
        raise AssertionError


@asynccontextmanager
async def errors_told(context: Context) -> AsyncIterator[None]:
    """End the call with the status that the table gives its error."""
    try:
        yield
    except RequestError as error:
        metadata: tuple[tuple[str, str], ...] = ()
        if isinstance(error, Overloaded):
            metadata = ((RETRY_AFTER_MS, str(max(1, round(1000 * error.retry_after_s)))),)
        await context.abort(STATUS[type(error)].grpc, str(error), metadata)


def seconds_left(context: Context) -> float | None:
    left: float | None = context.time_remaining()  # the stubs forget that there may be none
    return None if left is None else left - min(REPLY_SHARE * left, MOST_REPLY_S)


def peer(context: Context) -> str:
    """Address and port: one client per connection."""
    return context.peer()
