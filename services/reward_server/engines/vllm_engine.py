"""The engine over vLLM: continuous batching and a prefix cache, shared by scoring and sampling."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform

from services.reward_server.engines import (
    AnswerIds,
    EngineInfo,
    EngineUnhealthy,
    Route,
    SampleChunk,
    SampleRequest,
    ScoreJob,
    ScoreResult,
)
from services.reward_server.engines.limits import why_invalid
from services.reward_server.engines.version_lock import VersionLock
from services.reward_server.engines.vllm_checkpoint import (
    Checkpoint,
    check_same_model,
    read_checkpoint,
)
from services.reward_server.engines.vllm_plan import PlannedRequest, plan_requests
from services.reward_server.engines.vllm_requests import submitted
from services.reward_server.engines.vllm_sampling import SampleStream, sequence_requests
from services.reward_server.engines.vllm_scoring import (
    Reply,
    job_scores,
    read_reply,
    score_params,
    score_prompt,
    weights_label,
)
from services.reward_server.engines.vllm_start import Started, start_llm


class VllmEngine:
    """Scores, samples and swaps weights over one AsyncLLM; `start` makes one.

    A call holds the version lock while vLLM works for it: one call, one policy version. vLLM
    caches whole blocks only, and a request that finds part of a block computes it again, so
    tokens_computed may exceed what is unique. A request that vLLM preempts, for lack of cache
    memory, is counted as if it had run once.
    """

    def __init__(
        self,
        started: Started,
        model: Path,
        served: Checkpoint,
        *,
        policy_version: int,
        call_timeout_s: float,
        load_timeout_s: float,
    ) -> None:
        self.policy_version = policy_version
        self._llm = started.llm
        self._config = started.llm.vllm_config
        self._route = started.route
        self._cache = started.cache
        self._has_tokenizer = started.has_tokenizer
        self._model = model
        self._served = served
        self._call_timeout_s = call_timeout_s
        self._load_timeout_s = load_timeout_s
        self._lock = VersionLock()
        self._unhealthy = ""  # why, once it is
        model_config = self._config.model_config
        self._vocab_size: int = model_config.get_vocab_size()
        # The baseline's prompt is the whole sequence, and vLLM samples a token after any prompt.
        spare = 1 if started.route == "prompt_logprobs" else 0
        self._max_tokens: int = model_config.max_model_len - spare

    @classmethod
    async def start(
        cls,
        model: Path,
        *,
        dtype: str = "auto",
        route: Route | None = None,  # None takes the best that runs here
        max_tokens: int | None = None,  # longest sequence; None is the model's own limit
        kv_cache_bytes: int | None = None,  # None is 1 GiB on CPU, else vLLM's choice
        block_size: int | None = None,  # tokens per cache block; None is 32 on CPU, else vLLM's
        max_batch_tokens: int | None = None,  # per forward pass
        max_batch_requests: int | None = None,
        tensor_parallel: int = 1,
        policy_version: int = 0,
        call_timeout_s: float = 600.0,
        load_timeout_s: float = 600.0,
    ) -> "VllmEngine":
        served = await asyncio.to_thread(read_checkpoint, model)
        started = await start_llm(
            model,
            route,
            dtype=dtype,
            max_model_len=max_tokens,
            kv_cache_memory_bytes=kv_cache_bytes,
            block_size=block_size,
            max_num_batched_tokens=max_batch_tokens,
            max_num_seqs=max_batch_requests,
            tensor_parallel_size=tensor_parallel,
        )
        engine = cls(
            started,
            model,
            served,
            policy_version=policy_version,
            call_timeout_s=call_timeout_s,
            load_timeout_s=load_timeout_s,
        )
        try:
            await engine._try_out()
        except BaseException:
            await engine.close()
            raise
        return engine

    async def _try_out(self) -> None:
        """Score something, so that a route that does not work shows now, not with a caller.

        vLLM also compiles small kernels at the first request and at the first of another batch
        size, for seconds; the sequences are too short to leave anything in the cache.
        """
        await self._llm.update_weight_version(weights_label(self.policy_version))
        for size in (1, 3):
            jobs = [ScoreJob((i,), (1,), (AnswerIds((0,), 0, 1),)) for i in range(size)]
            result = await self.score(jobs)
            if problems := [job.reason for job in result.jobs if job.status != "OK"]:
                raise EngineUnhealthy(f"route {self._route} does not work: {problems[0]}")

    def info(self) -> EngineInfo:
        dtype = self._config.model_config.dtype
        # vLLM does not say what it took if the choice was left to it.
        limit = self._config.cache_config.kv_cache_memory_bytes or 0
        return EngineInfo(
            engine="vllm",
            model=str(self._model),
            route=self._route,
            dtype=str(dtype).removeprefix("torch."),
            device=current_platform.get_device_name(),
            vocab_size=self._vocab_size,
            max_tokens=self._max_tokens,
            cache_bytes=int(limit * self._cache.used_share),
            cache_limit_bytes=limit,
            memory_bytes=self._served.parameters * dtype.itemsize + limit,
        )

    async def score(self, jobs: Sequence[ScoreJob]) -> ScoreResult:
        invalid, requests = await asyncio.to_thread(self._plan, jobs)
        async with self._serving():
            version = self.policy_version
            replies, cached = await self._ask(jobs, requests, weights_label(version))
        scores = await asyncio.to_thread(job_scores, jobs, invalid, requests, replies, cached)
        return ScoreResult(tuple(scores), version, self._route)

    def _plan(self, jobs: Sequence[ScoreJob]) -> tuple[dict[int, str], list[PlannedRequest]]:
        """Return why jobs are invalid, by their number, and the requests for the others."""
        reasons = [why_invalid(job, self._max_tokens, self._vocab_size) for job in jobs]
        valid = [number for number, reason in enumerate(reasons) if not reason]
        invalid = {number: reason for number, reason in enumerate(reasons) if reason}
        return invalid, plan_requests(jobs, valid)

    async def _ask(
        self, jobs: Sequence[ScoreJob], requests: Sequence[PlannedRequest], weights: str
    ) -> tuple[list[Reply], list[int | None]]:
        """Return each request's reply, and how many positions it found cached if it ran."""
        wanted = (
            (
                score_prompt(self._route, jobs[request.uses[0].job], request),
                score_params(self._route, request.forced),
            )
            for request in requests
        )
        replies: list[Reply] = []
        cached: list[int | None] = []
        async with submitted(self._llm, wanted) as collectors:
            for request, collector in zip(requests, collectors, strict=True):
                if isinstance(collector, VLLMValidationError):
                    replies.append(f"vLLM refused the request: {collector}")
                    cached.append(None)
                    continue
                output = await collector.get()
                replies.append(read_reply(self._route, request.forced, output, weights))
                cached.append(output.num_cached_tokens)
        return replies, cached

    async def sample(self, request: SampleRequest) -> AsyncIterator[SampleChunk]:
        # vLLM works for a task of its own, which holds the version lock: a consumer that is
        # slow or walks away does not hold up a swap of the weights.
        chunks: asyncio.Queue[SampleChunk | None] = asyncio.Queue()
        work = asyncio.create_task(self._sample(request, chunks))
        try:
            while (chunk := await chunks.get()) is not None:
                yield chunk
            await work
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _sample(
        self, request: SampleRequest, chunks: asyncio.Queue[SampleChunk | None]
    ) -> None:
        try:
            async with self._serving():
                stream = SampleStream(request, self.policy_version, chunks.put_nowait)
                wanted = sequence_requests(
                    request, self._max_tokens, self._vocab_size, self._has_tokenizer
                )
                if isinstance(wanted, str):
                    for index in range(request.params.n):
                        stream.fail(index, wanted)
                    return
                async with submitted(self._llm, wanted) as collectors, asyncio.TaskGroup() as group:
                    for index, collector in enumerate(collectors):
                        if isinstance(collector, VLLMValidationError):
                            stream.fail(index, f"vLLM refused the request: {collector}")
                        else:
                            group.create_task(stream.forward(index, collector))
        finally:
            chunks.put_nowait(None)

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        """Serve one call under one policy version, for a bounded time, by a live vLLM."""
        try:
            async with asyncio.timeout(self._call_timeout_s), self._lock.serving():
                self._check_healthy()
                yield
        except TimeoutError as error:
            limit = f"{self._call_timeout_s:g} s"
            raise TimeoutError(f"vLLM did not finish the call within {limit}") from error
        except Exception as error:
            cause = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
            if isinstance(cause, EngineUnhealthy) or not self._llm.errored:
                raise cause from None
            self._unhealthy = f"vLLM's engine process died: {cause}"
            raise EngineUnhealthy(self._unhealthy) from cause

    def _check_healthy(self) -> None:
        if self._unhealthy:
            raise EngineUnhealthy(self._unhealthy)

    async def load_weights(self, directory: Path, policy_version: int) -> None:
        new = await asyncio.to_thread(read_checkpoint, directory)
        check_same_model(directory, new, self._served)
        async with self._lock.swapping():
            self._check_healthy()
            await _to_the_end(self._swap(directory, policy_version))

    async def _swap(self, directory: Path, policy_version: int) -> None:
        # Stands until the last step is done: whatever breaks off in between leaves weights
        # that nobody can vouch for, and vLLM paused.
        self._unhealthy = f"loading {directory} as version {policy_version} broke off half-way"
        try:
            async with asyncio.timeout(self._load_timeout_s):
                # Waits for running requests, of which the lock left none, and drops the cache.
                await self._llm.pause_generation(mode="wait", clear_cache=True)
                await self._llm.collective_rpc("load_directory", args=(str(directory),))
                await self._llm.update_weight_version(weights_label(policy_version))
                await self._llm.resume_generation()
        except Exception as error:
            self._unhealthy += f": {error!r}"
            raise EngineUnhealthy(self._unhealthy) from error
        self.policy_version, self._model, self._unhealthy = policy_version, directory, ""

    async def close(self) -> None:
        """Stop vLLM's processes, once the calls under way have finished."""
        async with self._lock.swapping():
            self._unhealthy = "the engine is closed"
            if self._llm is None:
                return
            if self._llm.output_handler is not None:
                self._llm.output_handler.cancel()  # else it reports the end as a crash
            await asyncio.to_thread(self._llm.shutdown)
            self._llm = None  # to be freed now, not in the last moments of the process


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await work that must not stop half-way; a cancellation takes effect after it."""
    task = asyncio.create_task(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
    task.result()
