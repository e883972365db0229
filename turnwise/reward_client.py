"""Client of the reward server: `RewardClient` for plain code, `AsyncRewardClient` for asyncio.

    with RewardClient(["gpu1:50051", "gpu2:50051"]) as client:
        result = client.score(from_group(group, answers))

Both perform the calls that a `ScoreRun` asks for, and hold one channel per endpoint, process and
event loop: a forked child or a second loop connects anew. The plain client starts no event loop,
so it also works where one runs, as in a notebook; threads may share it.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from typing import Any, Self
from uuid import uuid4

import grpc

from turnwise.client_channels import Channels, ClientOptions, forks
from turnwise.endpoints import (
    Call,
    Endpoint,
    Outcome,
    Reach,
    Reply,
    Router,
    to_outcome,
)
from turnwise.errors import (
    RewardError,
)
from turnwise.reward_session import AsyncRewardSession, RewardSession, Steps
from turnwise.score_result import ScoreResult
from turnwise.score_run import Attempts, FindRun, Run, ScoreRun
from turnwise.v1 import reward_pb2 as pb
from turnwise.v1 import reward_pb2_grpc

CLOSED = Outcome(grpc.StatusCode.CANCELLED, "the client was closed")
WAKE_S = 0.001  # later than the event that is waited for, not a moment before it


def _home_key(group_id: str) -> str:
    return f"group {group_id}" if group_id else uuid4().hex


def _sample_key(request: pb.SampleRequest) -> str:
    return _home_key(request.prompts[0].group_id if request.prompts else "")


class RewardClient:
    """Plain blocking client; safe to share between threads."""

    def __init__(self, addresses: str | Sequence[str], options: ClientOptions | None = None):
        self.options = options or ClientOptions()
        self.router = Router(addresses)
        credentials, arguments = self.options.credentials(), self.options.arguments()
        self._metadata = self.options.metadata()

        def make(address: str) -> grpc.Channel:
            if credentials is None:
                return grpc.insecure_channel(address, arguments)
            return grpc.secure_channel(address, credentials, arguments)

        self._channels = Channels(make)

    def __reduce__(self) -> Any:
        """What a spawned worker gets: the same addresses and options, and no connection."""
        return RewardClient, ([*self.router.endpoints], self.options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        for channel in self._channels.close():
            channel.close()

    def score(
        self,
        rollouts: Sequence[pb.Rollout],
        options: pb.ScoreOptions | None = None,
        *,
        deadline_s: float | None = None,
    ) -> ScoreResult:
        """Score rollouts; raises only when no server replied, else each one has a status."""
        run = ScoreRun(self._reach(deadline_s), rollouts, options, self.options)
        self._perform(run)
        return run.result()

    def info(
        self, group_id: str = "", *, deadline_s: float | None = None
    ) -> pb.GetServerInfoResponse:
        """What the group's endpoint serves now."""
        endpoint = self._find(self._reach(deadline_s, fresh=True), _home_key(group_id))
        return endpoint.served()

    def sample(
        self, request: pb.SampleRequest, *, deadline_s: float | None = None
    ) -> Iterator[pb.SampleResponse]:
        """Yield new tokens as they come; a retry happens only before the first of them."""
        attempts = Attempts(self._reach(deadline_s))
        while True:
            endpoint = self._find(attempts.reach, _sample_key(request))
            stub = reward_pb2_grpc.PolicyServiceStub(self._channels.get(endpoint.address))
            timeout_s = attempts.reach.deadline - monotonic()
            call = stub.Sample(request, timeout=timeout_s, metadata=self._metadata)
            begun = False
            try:
                with forks.calling():
                    for reply in call:
                        begun = True
                        yield reply
                return
            except grpc.RpcError as error:
                pause_s = attempts.pause_s(endpoint, to_outcome(error), begun)
            finally:
                call.cancel()
            sleep(pause_s)

    @contextmanager
    def session(
        self, first: pb.SessionOpen, *, deadline_s: float | None = None
    ) -> Iterator["RewardSession"]:
        """Open a session; the deadline is that of each step. Leaving it unclosed drops it."""
        with forks.calling():
            session = self._open(first, self._deadline_s(deadline_s))
            try:
                yield session
            finally:
                session.drop()

    def _open(self, first: pb.SessionOpen, deadline_s: float) -> "RewardSession":
        """Open it where a server can; until the first reply nothing is lost by trying again."""
        attempts, key = Attempts(self._reach(deadline_s)), _home_key(first.group_id)
        while True:
            endpoint = self._find(attempts.reach, key)
            stub = reward_pb2_grpc.RewardServiceStub(self._channels.get(endpoint.address))
            steps = Steps(endpoint, deadline_s)
            session = RewardSession(stub, steps, self._metadata)
            try:
                session.open(first, attempts.reach.deadline - monotonic())
                return session
            except RewardError:
                session.drop()
                pause_s = attempts.pause_s(endpoint, steps.outcome, begun=False)
            except BaseException:
                session.drop()
                raise
            sleep(pause_s)

    def _deadline_s(self, given: float | None) -> float:
        return self.options.deadline_s if given is None else given

    def _reach(self, deadline_s: float | None, fresh: bool = False) -> Reach:
        return Reach(self.router, monotonic() + self._deadline_s(deadline_s), fresh)

    def _find(self, reach: Reach, key: str) -> Endpoint:
        run = FindRun(reach, key)
        self._perform(run)
        return run.found()

    def _perform(self, run: Run) -> None:
        with forks.calling():
            self._make_calls(run)

    def _make_calls(self, run: Run) -> None:
        """Make the calls that the run wants; this thread waits, gRPC's own threads work."""
        replies: SimpleQueue[tuple[Call, Any]] = SimpleQueue()
        flying: set[Any] = set()
        try:
            while not run.done:
                for call in run.start(monotonic()):
                    future = self._begin(call)
                    flying.add(future)
                    future.add_done_callback(partial(_put, replies, call))
                if run.done:
                    return
                try:
                    call, future = replies.get(timeout=run.wait_s(monotonic()) + WAKE_S)
                except Empty:
                    continue
                flying.discard(future)
                run.finish(call, _reply(future), monotonic())
        finally:
            for future in flying:
                future.cancel()

    def _begin(self, call: Call) -> Any:
        stub = reward_pb2_grpc.RewardServiceStub(self._channels.get(call.endpoint.address))
        method = getattr(stub, call.method)
        return method.future(call.request, timeout=call.timeout_s, metadata=self._metadata)


def _put(replies: "SimpleQueue[tuple[Call, Any]]", call: Call, future: Any) -> None:
    replies.put((call, future))


def _reply(future: Any) -> Reply:
    try:
        reply: Reply = future.result()
    except (grpc.RpcError, grpc.FutureCancelledError) as error:
        return to_outcome(error)
    return reply


class AsyncRewardClient:
    """The same for asyncio; each event loop that uses it gets channels of its own."""

    def __init__(self, addresses: str | Sequence[str], options: ClientOptions | None = None):
        self.options = options or ClientOptions()
        self.router = Router(addresses)
        credentials, arguments = self.options.credentials(), self.options.arguments()
        self._metadata = self.options.metadata()

        def make(address: str) -> grpc.aio.Channel:
            if credentials is None:
                return grpc.aio.insecure_channel(address, arguments)
            return grpc.aio.secure_channel(address, credentials, arguments)

        self._channels = Channels(make)

    def __reduce__(self) -> Any:
        """What a spawned worker gets: the same addresses and options, and no connection."""
        return AsyncRewardClient, ([*self.router.endpoints], self.options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    async def close(self) -> None:
        for channel in self._channels.close():
            await channel.close()

    async def score(
        self,
        rollouts: Sequence[pb.Rollout],
        options: pb.ScoreOptions | None = None,
        *,
        deadline_s: float | None = None,
    ) -> ScoreResult:
        """Score rollouts; raises only when no server replied, else each one has a status."""
        run = ScoreRun(self._reach(deadline_s), rollouts, options, self.options)
        await self._perform(run)
        return run.result()

    async def info(
        self, group_id: str = "", *, deadline_s: float | None = None
    ) -> pb.GetServerInfoResponse:
        """What the group's endpoint serves now."""
        endpoint = await self._find(self._reach(deadline_s, fresh=True), _home_key(group_id))
        return endpoint.served()

    async def sample(
        self, request: pb.SampleRequest, *, deadline_s: float | None = None
    ) -> AsyncIterator[pb.SampleResponse]:
        """Yield new tokens as they come; a retry happens only before the first of them."""
        attempts = Attempts(self._reach(deadline_s))
        while True:
            endpoint = await self._find(attempts.reach, _sample_key(request))
            stub: Any = reward_pb2_grpc.PolicyServiceStub(self._channel(endpoint.address))
            timeout_s = attempts.reach.deadline - monotonic()
            call = stub.Sample(request, timeout=timeout_s, metadata=self._metadata)
            begun = False
            try:
                async for reply in call:
                    begun = True
                    yield reply
                return
            except grpc.RpcError as error:
                pause_s = attempts.pause_s(endpoint, to_outcome(error), begun)
            finally:
                call.cancel()
            await asyncio.sleep(pause_s)

    @asynccontextmanager
    async def session(
        self, first: pb.SessionOpen, *, deadline_s: float | None = None
    ) -> AsyncIterator["AsyncRewardSession"]:
        """Open a session; the deadline is that of each step. Leaving it unclosed drops it."""
        session = await self._open(first, self._deadline_s(deadline_s))
        try:
            yield session
        finally:
            session.drop()

    async def _open(self, first: pb.SessionOpen, deadline_s: float) -> "AsyncRewardSession":
        """Open it where a server can; until the first reply nothing is lost by trying again."""
        attempts, key = Attempts(self._reach(deadline_s)), _home_key(first.group_id)
        while True:
            endpoint = await self._find(attempts.reach, key)
            stub = reward_pb2_grpc.RewardServiceStub(self._channel(endpoint.address))
            steps = Steps(endpoint, deadline_s)
            session = AsyncRewardSession(stub, steps, self._metadata)
            try:
                await session.open(first, attempts.reach.deadline - monotonic())
                return session
            except RewardError:
                session.drop()
                pause_s = attempts.pause_s(endpoint, steps.outcome, begun=False)
            except BaseException:
                session.drop()
                raise
            await asyncio.sleep(pause_s)

    def _deadline_s(self, given: float | None) -> float:
        return self.options.deadline_s if given is None else given

    def _reach(self, deadline_s: float | None, fresh: bool = False) -> Reach:
        return Reach(self.router, monotonic() + self._deadline_s(deadline_s), fresh)

    def _channel(self, address: str) -> Any:
        return self._channels.get(address, asyncio.get_running_loop())

    async def _find(self, reach: Reach, key: str) -> Endpoint:
        run = FindRun(reach, key)
        await self._perform(run)
        return run.found()

    async def _perform(self, run: Run) -> None:
        """Make the calls that the run wants; none outlives this one."""
        flying: dict[asyncio.Task[Reply], Call] = {}
        try:
            while not run.done:
                for call in run.start(monotonic()):
                    flying[asyncio.create_task(self._make(call))] = call
                if run.done:
                    return
                wait_s = run.wait_s(monotonic()) + WAKE_S
                if not flying:
                    await asyncio.sleep(wait_s)
                    continue
                waiting = asyncio.wait(flying, timeout=wait_s, return_when="FIRST_COMPLETED")
                for task in (await waiting)[0]:
                    call = flying.pop(task)
                    # Only `close` cancels one of these tasks while this one goes on.
                    run.finish(call, CLOSED if task.cancelled() else task.result(), monotonic())
        finally:
            for task in flying:
                task.cancel()
            await asyncio.gather(*flying, return_exceptions=True)

    async def _make(self, call: Call) -> Reply:
        stub = reward_pb2_grpc.RewardServiceStub(self._channel(call.endpoint.address))
        method = getattr(stub, call.method)
        try:
            reply: Reply = await method(
                call.request, timeout=call.timeout_s, metadata=self._metadata
            )
        except grpc.RpcError as error:
            return to_outcome(error)
        return reply
