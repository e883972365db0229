"""PolicyService.Sample: many prompts at once over one engine, their tokens as they come."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from math import isfinite
from typing import cast

from services.reward_server.border import check_ids
from services.reward_server.engines import (
    Engine,
    EngineInfo,
    EngineUnhealthy,
    SampleChunk,
    SampleParams,
    SampleRequest,
)
from services.reward_server.errors import DeadlinePassed, InvalidRequest
from services.reward_server.replies import to_usage
from services.reward_server.requests import Limits
from turnwise.errors import InvalidInput
from turnwise.v1 import reward_pb2 as pb

BUFFERED_CHUNKS = 256  # between the engine and a slow reader
FINISH = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "error": pb.FINISH_REASON_ERROR,
}
MAX_STOPS, MAX_STOP_CHARACTERS = 64, 1024

Samples = asyncio.Queue[pb.SampleResponse | None]  # None: all sequences have ended


def check_sample(
    request: pb.SampleRequest, limits: Limits, engine: EngineInfo
) -> list[SampleRequest]:
    """Return one engine request per prompt; InvalidRequest names the field and the limit."""
    try:
        count = len(request.prompts) * (request.params.n or 1)
        if not count:
            raise InvalidInput("prompts", "is empty")
        if count > limits.max_samples:
            limit = f"max_samples={limits.max_samples}"
            raise InvalidInput("prompts", f"{count} sequences exceed the limit {limit}")
        checked = []
        for i, prompt in enumerate(request.prompts):
            ids = check_ids(f"prompts[{i}].token_ids", prompt.token_ids, engine)
            if len(ids) >= engine.max_tokens:
                problem = f"{len(ids)} tokens leave no room in max_tokens={engine.max_tokens}"
                raise InvalidInput(f"prompts[{i}].token_ids", problem)
            checked.append(SampleRequest(ids, _params(request.params, engine, len(ids))))
    except InvalidInput as error:
        raise InvalidRequest(str(error)) from None
    return checked


def _params(params: pb.SamplingParams, engine: EngineInfo, prompt_tokens: int) -> SampleParams:
    temperature = params.temperature if params.HasField("temperature") else 1.0
    top_p = params.top_p if params.HasField("top_p") else 1.0
    if not (isfinite(temperature) and temperature >= 0):
        raise InvalidInput("params.temperature", f"must be 0 or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise InvalidInput("params.top_p", f"must be in (0, 1], got {top_p}")
    stops = (*params.stop_token_ids, *params.stop_strings)
    if len(stops) > MAX_STOPS:
        raise InvalidInput("params.stop_*", f"{len(stops)} exceed the limit of {MAX_STOPS}")
    if not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in params.stop_strings):
        problem = f"each must have 1..{MAX_STOP_CHARACTERS} characters"
        raise InvalidInput("params.stop_strings", problem)
    return SampleParams(
        max_tokens=params.max_tokens or engine.max_tokens - prompt_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=params.top_k,
        stop_token_ids=tuple(params.stop_token_ids),
        stop_strings=tuple(params.stop_strings),
        seed=params.seed if params.HasField("seed") else None,
        n=params.n or 1,
    )


async def sample_all(
    engine: Engine,
    prompts: Sequence[pb.SamplePrompt],
    requests: Sequence[SampleRequest],
    deadline: float,
) -> AsyncGenerator[pb.SampleResponse, None]:
    """Yield every prompt's chunks as they come; closing it frees the work."""
    samples: Samples = asyncio.Queue(BUFFERED_CHUNKS)
    work = asyncio.create_task(_sample_all(engine, prompts, requests, samples))
    try:
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    sample = await samples.get()
            except TimeoutError:
                raise DeadlinePassed("the deadline passed while sampling") from None
            if sample is None:
                break
            yield sample
        await work
    finally:
        work.cancel()
        await asyncio.wait([work])


async def _sample_all(
    engine: Engine,
    prompts: Sequence[pb.SamplePrompt],
    requests: Sequence[SampleRequest],
    samples: Samples,
) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            for i, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
                group.create_task(_sample(engine, prompt, i, request, samples))
    except ExceptionGroup as errors:
        await samples.put(None)
        raise errors.exceptions[0] from None
    await samples.put(None)


async def _sample(
    engine: Engine, prompt: pb.SamplePrompt, index: int, request: SampleRequest, samples: Samples
) -> None:
    """Send one prompt's chunks; an engine that fails ends its unfinished sequences."""
    unfinished = set(range(request.params.n))
    chunks = cast(AsyncGenerator[SampleChunk, None], engine.sample(request))
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                if chunk.finish_reason:
                    unfinished.discard(chunk.index)
                await samples.put(_response(prompt, index, chunk))
    except EngineUnhealthy:
        raise
    except Exception as error:
        for i in unfinished:
            reason = f"the engine failed: {error}"
            chunk = SampleChunk(i, (), (), engine.policy_version, "error", reason)
            await samples.put(_response(prompt, index, chunk))


def _response(prompt: pb.SamplePrompt, index: int, chunk: SampleChunk) -> pb.SampleResponse:
    return pb.SampleResponse(
        prompt_id=prompt.prompt_id,
        prompt_index=index,
        sequence_index=chunk.index,
        token_ids=chunk.token_ids,
        logprobs=chunk.logprobs,
        finish_reason=FINISH[chunk.finish_reason],
        reason=chunk.reason,
        policy_version=chunk.policy_version,
        usage=to_usage(chunk.usage) if chunk.finish_reason else None,
    )
