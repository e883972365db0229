"""What both front doors do with a call: one object behind gRPC and REST, protobuf in and out."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from services.reward_server.engines import EngineUnhealthy
from services.reward_server.errors import (
    DeadlinePassed,
    EngineFailed,
    InvalidRequest,
    NotReady,
    Overloaded,
    RequestError,
    RequestTooLarge,
)
from services.reward_server.idempotency import ReplyStore, content_digest
from services.reward_server.metrics import ServerMetrics
from services.reward_server.replies import to_info
from services.reward_server.requests import Limits
from services.reward_server.sampling import check_sample, sample_all
from services.reward_server.scoring import Backend, apart, score_request
from services.reward_server.sessions import Session
from services.reward_server.tokenizer import TokenizerSource
from turnwise.errors import InvalidInput
from turnwise.v1 import reward_pb2 as pb

log = logging.getLogger(__name__)
MAX_CALLS = 8192  # under way at the same time
RETRY_S = 1.0  # when sequences or sessions are many: about when some end


class Handlers:
    """Every method raises a RequestError (errors.py) when it fails as a whole."""

    def __init__(
        self,
        metrics: ServerMetrics,
        limits: Limits,
        tokenizer: TokenizerSource,
        *,
        max_call_s: float = 600.0,
        session_idle_s: float = 600.0,
        replies_bytes: int = 64 << 20,
    ) -> None:
        self.metrics, self.limits = metrics, limits
        self._tokenizer = tokenizer
        self._max_call_s, self._session_idle_s = max_call_s, session_idle_s
        self._replies = ReplyStore(replies_bytes, metrics.replies_bytes.set)
        self._backend: Backend | None = None
        self._not_ready = "loading the model"  # why calls are refused; empty: they are not
        self._running: Counter[str] = Counter()  # calls under way by method
        self._sequences = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def serve(self, backend: Backend) -> None:
        self._backend = backend
        self._set_ready("")

    def refuse(self, reason: str) -> None:
        """Answer no new calls from now on: draining, or an engine that cannot vouch for itself."""
        self._set_ready(reason)

    def _set_ready(self, problem: str) -> None:
        self._not_ready = problem
        self.metrics.ready.set(0 if problem else 1)

    async def idle(self) -> None:
        """Return when no call is under way."""
        await self._idle.wait()

    async def ready(self) -> tuple[bool, str]:
        """Whether calls are answered, and if not, why."""
        problem = self._problem()
        return not problem, problem

    def _problem(self) -> str:
        backend = self._backend
        if not self._not_ready and backend is not None and not backend.policy.healthy:
            self.refuse(f"the engine failed while it loaded: {backend.policy.last_error}")
        return self._not_ready

    @contextmanager
    def _call(self, method: str) -> Iterator[Backend]:
        """Count a call and its outcome; refuse it when the server is not ready or full."""
        status = "Cancelled"
        try:
            if (problem := self._problem()) or self._backend is None:
                raise NotReady(problem)
            if self._running.total() >= MAX_CALLS:
                raise Overloaded(f"{MAX_CALLS} calls are under way", RETRY_S)
            self._running[method] += 1
            self._idle.clear()
            try:
                yield self._backend
            finally:
                self._running[method] -= 1
                if not self._running.total():
                    self._idle.set()
            status = "OK"
        except EngineUnhealthy as error:
            status = "NotReady"
            self.refuse(f"the engine is unhealthy: {error}")
            raise NotReady(self._not_ready) from error
        except RequestError as error:
            status = type(error).__name__
            raise
        except Exception as error:
            status = "EngineFailed"
            log.exception("call failed", extra={"method": method})
            raise EngineFailed(f"{method} failed: {error}") from error
        finally:
            self.metrics.requests.labels(method, status).inc()

    def _deadline(self, deadline_s: float | None) -> float:
        """In loop time. Nothing waits for ever: a caller without a deadline gets one."""
        limit_s = self._max_call_s
        seconds = limit_s if deadline_s is None else min(deadline_s, limit_s)
        return asyncio.get_running_loop().time() + seconds

    async def score_turns(
        self, request: pb.ScoreTurnsRequest, deadline_s: float | None = None, client: str = ""
    ) -> pb.ScoreTurnsResponse:
        """Score a batch; `deadline_s` from now, `client` names whom the queue is fair to."""
        deadline = self._deadline(deadline_s)
        with self._call("ScoreTurns") as backend, self.metrics.seconds.labels("total").time():
            if (size := request.ByteSize()) > (limit := self.limits.max_request_bytes):
                raise RequestTooLarge(f"{size} bytes exceed the limit max_request_bytes={limit}")

            async def score() -> pb.ScoreTurnsResponse:
                reply, results = await score_request(
                    request, backend, self.limits, deadline, client
                )
                for result in results:
                    self.metrics.rollouts.labels(result.status).inc()
                    self.metrics.prefixes.inc(len(result.scores))
                return reply

            if not request.idempotency_key:
                return await score()
            digest = await apart(size, content_digest, request)
            return await self._replies.once(request.idempotency_key, digest, deadline, score)

    async def score_session(
        self,
        requests: AsyncIterator[pb.ScoreSessionRequest],
        deadline_s: float | None = None,
        client: str = "",
    ) -> AsyncGenerator[pb.ScoreSessionResponse, None]:
        """Answer each step; ends after close, or when the stream of requests ends."""
        loop = asyncio.get_running_loop()
        end = float("inf") if deadline_s is None else loop.time() + deadline_s
        with self._call("ScoreSession") as backend:
            if self._running["ScoreSession"] > (limit := self.limits.max_sessions):
                raise Overloaded(f"more sessions than max_sessions={limit} are open", RETRY_S)
            with self.metrics.sessions.track_inprogress():
                session = Session(backend, self.limits, client)
                while (request := await self._next_step(requests)) is not None:
                    deadline = min(end, self._deadline(None))
                    yield await session.step(request, deadline)
                    if request.WhichOneof("step") == "close":
                        return

    async def _next_step(
        self, requests: AsyncIterator[pb.ScoreSessionRequest]
    ) -> pb.ScoreSessionRequest | None:
        try:
            async with asyncio.timeout(self._session_idle_s):
                return await anext(requests, None)
        except TimeoutError:
            raise DeadlinePassed(f"no step came for {self._session_idle_s:g} s") from None

    async def info(self) -> pb.GetServerInfoResponse:
        with self._call("GetServerInfo") as backend:
            reference = backend.reference.engine.info() if backend.reference else None
            version = backend.policy.version
            return to_info(backend.engine.info(), version, reference, self.limits)

    async def sample(
        self, request: pb.SampleRequest, deadline_s: float | None = None
    ) -> AsyncGenerator[pb.SampleResponse, None]:
        deadline = self._deadline(deadline_s)
        with self._call("Sample") as backend:
            checked = check_sample(request, self.limits, backend.engine.info())
            if not await backend.has_version(request.min_policy_version, deadline):
                least, served = request.min_policy_version, backend.policy.version
                raise DeadlinePassed(f"min_policy_version {least} is not served, {served} is")
            with self._room_for(sum(prompt.params.n for prompt in checked)):
                samples = sample_all(backend.engine, request.prompts, checked, deadline)
                async with aclosing(samples):
                    async for sample in samples:
                        self.metrics.sampled_tokens.inc(len(sample.token_ids))
                        yield sample

    @contextmanager
    def _room_for(self, sequences: int) -> Iterator[None]:
        limit = self.limits.max_running_samples
        if self._sequences + sequences > limit:
            raise Overloaded(f"max_running_samples={limit} are being sampled", RETRY_S)
        self._sequences += sequences
        self.metrics.sequences.set(self._sequences)
        try:
            yield
        finally:
            self._sequences -= sequences
            self.metrics.sequences.set(self._sequences)

    async def load_policy(self, request: pb.LoadPolicyRequest) -> pb.LoadPolicyResponse:
        with self._call("LoadPolicy") as backend:
            try:
                load_s = await backend.policy.load(
                    request.path, request.policy_version, request.manifest_sha256
                )
            except InvalidInput as error:
                raise InvalidRequest(str(error)) from error
            return pb.LoadPolicyResponse(policy_version=request.policy_version, load_seconds=load_s)

    async def tokenizer(self) -> Any:
        """The policy's tokenizer (transformers), loaded once; InvalidRequest if there is none."""
        return await self._tokenizer.get()
