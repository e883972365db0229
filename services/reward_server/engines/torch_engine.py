"""The torch engine: packed-trie scoring and continuous-batching sampling over one model.

One thread owns the model, its trie and its sampler; score chunks and sampling steps take turns
in it. New weights are loaded beside the old and swapped in when no call is under way.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from msgspec.structs import replace

from services.reward_server.engines import (
    EngineInfo,
    JobScore,
    SampleChunk,
    SampleRequest,
    ScoreJob,
    ScoreResult,
)
from services.reward_server.engines.attention import BACKENDS
from services.reward_server.engines.limits import why_invalid, why_not_sampled
from services.reward_server.engines.model import DecoderModel
from services.reward_server.engines.sampler import Sampler, report
from services.reward_server.engines.sampler import Sequence as Sampled
from services.reward_server.engines.tokenizer import load_tokenizer
from services.reward_server.engines.trie import Trie
from services.reward_server.engines.trie_scorer import Chunk, as_ids
from services.reward_server.engines.usage import count_tokens
from services.reward_server.engines.version_lock import VersionLock
from turnwise.errors import InvalidInput

log = logging.getLogger(__name__)
Result = TypeVar("Result")
News = asyncio.Queue[SampleChunk | None]  # None: nothing more comes

DTYPES = {
    "auto": None,  # as the checkpoint was saved
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
CACHE_BYTES = 2 << 30  # KV kept between calls where nobody says how much
OUT_OF_MEMORY = ("allocate memory", "not enough memory", "out of memory")


class TorchEngine:
    """An Engine over a transformers checkpoint; see docs/architecture.md."""

    def __init__(
        self,
        model_path: Path,
        *,
        policy_version: int = 0,
        dtype: str = "auto",
        device: str = "auto",  # CUDA where there is a device
        attention: str = "auto",
        max_batch_tokens: int = 8192,  # tokens per forward pass
        cache_bytes: int = CACHE_BYTES,
        max_running: int = 256,  # sequences sampled at the same time
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.dtype = DTYPES[dtype]
        self.budget, self.cache_bytes, self.max_running = max_batch_tokens, cache_bytes, max_running
        if attention == "auto":
            attention = "flex" if self.device.type == "cuda" else "merged"
        self.attention = BACKENDS[attention]
        self.policy_version = policy_version
        self._calls = count(1)
        self._lock = VersionLock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="torch-engine")
        self._sampling: asyncio.Task[None] | None = None
        self._listeners: dict[int, tuple[News, asyncio.Semaphore]] = {}
        self._serve(model_path, DecoderModel(model_path, self.dtype, self.device))

    def _serve(self, model_path: Path, model: DecoderModel) -> None:
        self.model_path, self.model = model_path, model
        self.trie = Trie(self.cache_bytes)
        self.sampler = Sampler(model, self.attention, self.trie, self.budget, self.max_running)

    async def _in_thread(self, work: Callable[..., Result], *args: object) -> Result:
        def without_grad() -> Result:
            with torch.inference_mode():
                return work(*args)

        return await asyncio.get_running_loop().run_in_executor(self._thread, without_grad)

    def info(self) -> EngineInfo:
        cached = self.trie.held_bytes
        return EngineInfo(
            "torch",
            str(self.model_path),
            "trie",
            str(self.model.dtype).removeprefix("torch."),
            self.device.type,
            self.model.vocab_size,
            self.model.max_tokens,
            cached,
            self.cache_bytes,
            self.model.bytes() + cached,
        )

    async def score(self, jobs: Sequence[ScoreJob]) -> ScoreResult:
        async with self._lock.serving():
            results: list[JobScore | None] = [self._refusal(job) for job in jobs]
            version, call = self.policy_version, next(self._calls)
            # In trie order a branch once left is not needed again, whatever the cache holds.
            order = sorted(
                (i for i, refused in enumerate(results) if refused is None),
                key=lambda i: (np.asarray(jobs[i].token_ids, ">u4").tobytes(), i),
                reverse=True,
            )
            counted = await self._in_thread(count_tokens, [jobs[i] for i in sorted(order)])
            usages = dict(zip(sorted(order), counted, strict=True))
            while order:
                for i, result in await self._in_thread(self._score_some, jobs, order, call):
                    results[i] = replace(result, usage=usages[i] + result.usage)
        done = tuple(result for result in results if result is not None)
        assert len(done) == len(jobs)
        return ScoreResult(done, version, "trie")

    def _refusal(self, job: ScoreJob) -> JobScore | None:
        reason = why_invalid(job, self.model.max_tokens, self.model.vocab_size)
        return JobScore("INVALID", reason) if reason else None

    def _score_some(
        self, jobs: Sequence[ScoreJob], order: list[int], call: int
    ) -> list[tuple[int, JobScore]]:
        """Score the last jobs of `order`, about one forward pass of them, and take them off."""
        chunk = Chunk(self.trie, call)
        taken: list[int] = []
        try:
            while order and chunk.tokens < self.budget:
                taken.append(order.pop())
                chunk.add(jobs[taken[-1]])
            scores = chunk.score(self.model, self.attention, self.budget)
            if any(one.status == "ERROR" for one in scores):
                # A masked key has weight zero, and zero times NaN is NaN for whoever met it.
                raise ArithmeticError("a log-prob was not finite")
        except Exception as error:
            self._clean(everything=True)
            return self._score_apart(jobs, taken, call, error)
        self._clean()
        return list(zip(taken, scores, strict=True))

    def _score_apart(
        self, jobs: Sequence[ScoreJob], taken: list[int], call: int, error: Exception
    ) -> list[tuple[int, JobScore]]:
        """After a failure: each job alone, in smaller passes if memory was short."""
        log.warning("scoring failed, retrying job by job", extra={"error": str(error)})
        short = any(sign in str(error) for sign in OUT_OF_MEMORY) or isinstance(error, MemoryError)
        budget = max(1, self.budget // 8) if short else self.budget
        results = []
        for i in taken:
            chunk = Chunk(self.trie, call)
            try:
                chunk.add(jobs[i])
                results.append((i, chunk.score(self.model, self.attention, budget)[0]))
            except Exception as again:
                results.append((i, JobScore("ERROR", f"the engine failed: {again}")))
            self._clean(everything=short or results[-1][1].status == "ERROR")
        return results

    def _clean(self, everything: bool = False) -> None:
        self.trie.drop_transient()
        self.trie.evict(0 if everything else None)

    async def sample(self, request: SampleRequest) -> AsyncIterator[SampleChunk]:
        # A task of its own holds the version lock until the last token is sampled: a consumer
        # that is slow or walks away does not hold up a swap of the weights.
        news: News = asyncio.Queue()
        work = asyncio.create_task(self._sample(request, news))
        try:
            while (chunk := await news.get()) is not None:
                yield chunk
            await work
        finally:
            work.cancel()
            await asyncio.wait([work])

    async def _sample(self, request: SampleRequest, news: News) -> None:
        """Have every sequence of a request sampled to its end under one policy version."""
        params = request.params
        sequences: list[Sampled] = []
        try:
            async with self._lock.serving():
                limit, vocab = self.model.max_tokens, self.model.vocab_size
                if reason := why_not_sampled(request, limit, vocab):
                    for index in range(params.n):
                        chunk = SampleChunk(index, (), (), self.policy_version, "error", reason)
                        news.put_nowait(chunk)
                    return
                if params.stop_strings and self.sampler.decode is None:
                    self.sampler.decode = await self._in_thread(load_decode, self.model_path)
                prompt = as_ids(request.token_ids)
                room = min(params.max_tokens, limit - len(prompt))
                sequences = [Sampled(prompt, params, index, room) for index in range(params.n)]
                ended = asyncio.Semaphore(0)
                self._listeners |= {id(sequence): (news, ended) for sequence in sequences}
                self.sampler.waiting.extend(sequences)
                if self._sampling is None or self._sampling.done():
                    self._sampling = asyncio.create_task(self._sample_all())
                for _ in sequences:
                    await ended.acquire()
        finally:
            for sequence in sequences:
                sequence.cancelled = sequence.finish is None
                self._listeners.pop(id(sequence), None)
            news.put_nowait(None)

    async def _sample_all(self) -> None:
        """Step the sampler while anybody wants tokens."""
        while self.sampler.busy():
            try:
                news = await self._in_thread(self.sampler.step)
            except Exception as error:
                log.warning("sampling failed", extra={"error": str(error)})
                news = self.sampler.abandon()
                await self._in_thread(self._clean, True)
                for sequence in news:
                    sequence.finish, sequence.reason = "error", f"the engine failed: {error}"
            self._tell(news)

    def _tell(self, news: Sequence[Sampled]) -> None:
        """Pass the new tokens of some sequences on to whoever listens."""
        for sequence in news:
            if (listener := self._listeners.get(id(sequence))) is not None:
                listener[0].put_nowait(self._chunk(sequence))
                if sequence.finish:
                    listener[1].release()

    def _chunk(self, sequence: Sampled) -> SampleChunk:
        ids, logprobs, usage = report(sequence)
        return SampleChunk(
            sequence.index,
            ids,
            logprobs,
            self.policy_version,
            sequence.finish,
            sequence.reason,
            usage,
        )

    async def load_weights(self, directory: Path, policy_version: int) -> None:
        """Serve a checkpoint of the same shape; whatever is wrong with it changes nothing."""
        try:
            model = await asyncio.to_thread(DecoderModel, directory, self.dtype, self.device)
        except Exception as error:  # transformers, safetensors and torch all have their own
            raise InvalidInput(str(directory), f"is no usable checkpoint: {error}") from error
        shape = (*model.kv_shape.shape, model.vocab_size)
        if shape != (*self.model.kv_shape.shape, self.model.vocab_size):
            raise InvalidInput(str(directory), "is a model of another shape than the one served")
        async with self._lock.swapping():
            await self._in_thread(int)  # calls that were cancelled may still be at work in it
            # No await from here on: whoever cancels this call stops all of it or nothing.
            self._serve(directory, model)
            self.policy_version = policy_version

    async def close(self) -> None:
        if self._sampling is not None:
            self._sampling.cancel()
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
        left = [*self.sampler.abandon(), *self.sampler.waiting]
        self.sampler.waiting.clear()
        for sequence in left:
            sequence.finish, sequence.reason = "error", "the engine was closed"
        self._tell(left)


def load_decode(model_path: Path) -> Callable[[list[int]], str]:
    """The tokenizer of the checkpoint, for stop strings alone."""
    tokenizer = load_tokenizer(model_path)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    return decode
