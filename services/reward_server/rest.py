"""The REST front door: JSON in and out around Handlers, as protobuf says it.

A request becomes the same protobuf message as over gRPC, so validation and scorer are the same.
"""

import asyncio
import math
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar, cast

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.requests import ClientDisconnect

from services.reward_server import rest_models as models
from services.reward_server.auth import App
from services.reward_server.errors import (
    STATUS,
    DeadlinePassed,
    InvalidRequest,
    NotReady,
    Overloaded,
    RequestError,
    RequestTooLarge,
)
from services.reward_server.handlers import Handlers
from services.reward_server.rest_docs import DEADLINE_HEADER, add_request_models, score_turns_docs
from services.reward_server.rest_json import (
    TEXT_FIELDS,
    is_text_form,
    parse,
    parse_json,
    parse_text,
    to_dict,
    to_json,
)
from services.reward_server.scoring import apart
from services.reward_server.servicer import MOST_REPLY_S, REPLY_SHARE
from services.reward_server.text_form import TextForm
from turnwise import __version__
from turnwise.errors import InvalidInput
from turnwise.v1 import reward_pb2 as pb

READ_S = 60.0  # for a body whose request names no deadline
CLIENT_GONE = 499  # nobody reads it; for the log of a proxy

Result = TypeVar("Result")


class Converted(NamedTuple):
    """The ids form of a text form, and why some of its rollouts have none."""

    request: pb.ScoreTurnsRequest
    reasons: dict[int, str]


def make_app(handlers: Handlers, registry: CollectorRegistry = REGISTRY) -> App:
    """The bearer token is asked for around this app (auth.py)."""
    app = FastAPI(title="turnwise reward server", version=__version__, redoc_url=None)
    front = Front(handlers, registry)
    app.add_exception_handler(RequestError, tell_error)
    app.post("/v1/score_turns", **score_turns_docs())(front.score_turns)
    app.get("/v1/info", response_model=models.ServerInfo, summary="What is served")(front.info)
    app.get("/healthz", summary="Whether the process lives")(front.healthz)
    app.get("/readyz", summary="Whether calls are answered")(front.readyz)
    app.get("/metrics", summary="Prometheus metrics", response_class=Response)(front.metrics)
    add_request_models(app)
    return cast(App, app)


class Front:
    """The routes."""

    def __init__(self, handlers: Handlers, registry: CollectorRegistry) -> None:
        self._handlers, self._registry = handlers, registry
        # A tokenizer is no thing for two threads at a time; who waits for it can be cancelled.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="text-form")

    async def score_turns(self, request: Request) -> Response:
        """Score a batch of rollouts, as token ids or as chat messages."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        with self._refusals_counted():
            seconds = deadline_s(request)
            try:
                body = await self._read(request, READ_S if seconds is None else seconds)
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE)
        end = None if seconds is None else began + seconds
        peer = f"{request.client.host}:{request.client.port}" if request.client else ""
        try:
            reply = await unless_gone(request, self._answer(body, end, peer))
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        return Response(reply, media_type="application/json")

    async def _read(self, request: Request, seconds: float) -> bytes:
        limit = self._handlers.limits.max_request_bytes
        problem = f"the body exceeds the limit max_request_bytes={limit}"
        length = request.headers.get("content-length", "")
        if length.isdecimal() and (len(length) > len(str(limit)) or int(length) > limit):
            raise RequestTooLarge(problem)
        body = bytearray()
        try:
            async with asyncio.timeout(seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise RequestTooLarge(problem)
        except TimeoutError:
            raise DeadlinePassed(f"the body was not there after {seconds:g} s") from None
        return bytes(body)

    async def _answer(self, body: bytes, end: float | None, peer: str) -> bytes:
        with self._refusals_counted():
            call = await apart(len(body), parse_json, body)
            if is_text_form(call):
                converted = await self._convert(call, len(body), end)
            else:
                message = await apart(len(body), parse, call, pb.ScoreTurnsRequest())
                converted = Converted(message, {})
            left = seconds_left(end)
        reply = await self._handlers.score_turns(converted.request, left, peer)
        for index, reason in converted.reasons.items():
            reply.scores[index].reason = reason
        rollouts = converted.request.rollouts if is_text_form(call) else None
        return await apart(len(body) + reply.ByteSize(), to_json, reply, rollouts)

    async def _convert(self, call: dict[str, Any], size: int, end: float | None) -> Converted:
        """A rollout that cannot be converted goes on without ids, to be INVALID in its place."""
        ready, problem = await self._handlers.ready()
        if not ready:
            raise NotReady(problem)
        text = await apart(size, parse_text, call)
        rest = {name: value for name, value in call.items() if name not in TEXT_FIELDS}
        request = parse(rest, pb.ScoreTurnsRequest())
        limits = self._handlers.limits
        if len(text.rollouts) > limits.max_rollouts:
            problem = f"{len(text.rollouts)} exceed the limit max_rollouts={limits.max_rollouts}"
            raise InvalidRequest(f"rollouts: {problem}")
        form = TextForm(await self._handlers.tokenizer(), text, limits)
        loop, reasons = asyncio.get_running_loop(), {}
        for index, rollout in enumerate(text.rollouts):
            try:
                async with asyncio.timeout_at(end):
                    ids = await loop.run_in_executor(self._tokenizing, form.to_rollout, rollout)
            except TimeoutError:
                raise DeadlinePassed("the deadline passed while text was tokenised") from None
            except InvalidInput as error:
                reasons[index] = str(error)
                ids = pb.Rollout(rollout_id=rollout.rollout_id, group_id=rollout.group_id)
            request.rollouts.append(ids)
        return Converted(request, reasons)

    @contextmanager
    def _refusals_counted(self) -> Iterator[None]:
        """Handlers count what reaches them; this counts what never does."""
        try:
            yield
        except RequestError as error:
            status = type(error).__name__
            self._handlers.metrics.requests.labels("ScoreTurns", status).inc()
            raise

    async def info(self) -> Response:
        """Model, policy version, engine, route and limits."""
        return JSONResponse(to_dict(await self._handlers.info()))

    async def healthz(self) -> dict[str, str]:
        return {"status": "ok"}

    async def readyz(self) -> Response:
        ready, problem = await self._handlers.ready()
        if ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"detail": problem}, STATUS[NotReady].http)

    async def metrics(self, request: Request) -> Response:
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._registry), headers={"content-type": kind})


async def tell_error(_request: Request, error: Exception) -> Response:
    """End the call with the status that the table gives its error."""
    assert isinstance(error, RequestError)
    headers = {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    return JSONResponse({"detail": str(error)}, STATUS[type(error)].http, headers)


def deadline_s(request: Request) -> float | None:
    text = request.headers.get(DEADLINE_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidRequest(f"header {DEADLINE_HEADER}: must be seconds above 0, got {text[:40]}")
    return seconds


def seconds_left(end: float | None) -> float | None:
    """Until the deadline, less what the reply takes: what is late by then is told as DEADLINE."""
    if end is None:
        return None
    left = end - asyncio.get_running_loop().time()
    if left <= 0:
        raise DeadlinePassed("the deadline passed while the request was read")
    return left - min(REPLY_SHARE * left, MOST_REPLY_S)


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """Await the work; cancel it, and raise ClientDisconnect, when the caller hangs up."""
    working = asyncio.ensure_future(work)
    gone = asyncio.create_task(_hang_up(request))
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return await working
        raise ClientDisconnect
    finally:
        gone.cancel()
        working.cancel()
        await asyncio.wait([working, gone])


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
