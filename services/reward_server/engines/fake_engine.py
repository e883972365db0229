"""An Engine whose numbers one can work out by hand, for tests of the layers above.

The log-prob of a token is -(1 + (sum of all ids before it + its id + policy version) % 10) / 10,
and the token sampled next is (sum of the ids before it + index + policy version) % vocab_size.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from msgspec.structs import replace

from services.reward_server.engines import (
    AnswerIds,
    EngineInfo,
    FinishReason,
    JobScore,
    SampleChunk,
    SampleRequest,
    ScoreJob,
    ScoreResult,
    Usage,
)
from services.reward_server.engines.limits import why_invalid, why_not_sampled
from services.reward_server.engines.usage import count_tokens
from services.reward_server.engines.version_lock import VersionLock


class FakeEngine:
    """Caches nothing, computes what is unique, and sleeps for every position it computes."""

    def __init__(
        self,
        *,
        policy_version: int = 0,
        vocab_size: int = 100,
        max_tokens: int = 4096,
        poison_id: int | None = None,  # a job or prompt that names it is an error
        seconds_per_token: float = 0.0,
    ) -> None:
        self.policy_version = policy_version
        self.vocab_size, self.max_tokens = vocab_size, max_tokens
        self.poison_id, self.seconds_per_token = poison_id, seconds_per_token
        self._lock = VersionLock()

    def info(self) -> EngineInfo:
        vocab, limit = self.vocab_size, self.max_tokens
        return EngineInfo("fake", "fake", "fake", "float32", "cpu", vocab, limit)

    async def score(self, jobs: Sequence[ScoreJob]) -> ScoreResult:
        async with self._lock.serving():
            reasons = [why_invalid(job, self.max_tokens, self.vocab_size) for job in jobs]
            asked = [*zip(jobs, reasons, strict=True)]
            usages = iter(count_tokens([job for job, reason in asked if not reason]))
            done = tuple(
                JobScore("INVALID", reason) if reason else self._score(job, next(usages))
                for job, reason in asked
            )
            result = ScoreResult(done, self.policy_version, "fake")
            await asyncio.sleep(self.seconds_per_token * result.usage.tokens_computed)
            return result

    def _score(self, job: ScoreJob, usage: Usage) -> JobScore:
        usage = replace(usage, tokens_computed=usage.tokens_unique)
        if any(
            self.poison_id in ids for ids in (job.token_ids, *(a.token_ids for a in job.answers))
        ):
            return JobScore("ERROR", f"token {self.poison_id} is poison", usage=usage)
        logprobs = tuple(
            tuple(self._answer(job.token_ids[:end], answer) for answer in job.answers)
            for end in job.prefix_ends
        )
        return JobScore("OK", "", logprobs, usage)

    def _answer(self, prefix: tuple[int, ...], answer: AnswerIds) -> tuple[float, ...]:
        ids, span = answer.token_ids, range(answer.scored_start, answer.scored_end)
        return tuple(self._logprob((*prefix, *ids[:i]), ids[i]) for i in span)

    def _logprob(self, before: Sequence[int], token: int) -> float:
        return -(1 + (sum(before) + token + self.policy_version) % 10) / 10

    async def sample(self, request: SampleRequest) -> AsyncIterator[SampleChunk]:
        """One token per chunk, the n sequences taking turns. Stop strings are never met."""
        async with self._lock.serving():
            sequences = {index: list(request.token_ids) for index in range(request.params.n)}
            while sequences:
                await asyncio.sleep(self.seconds_per_token * len(sequences))
                for index, ids in [*sequences.items()]:
                    chunk = self._next(index, ids, request)
                    if chunk.finish_reason:
                        del sequences[index]
                    yield chunk

    def _next(self, index: int, ids: list[int], request: SampleRequest) -> SampleChunk:
        """Extend one sequence by a token; the chunk tells it."""
        version, prompt, params = self.policy_version, len(request.token_ids), request.params
        if self.poison_id in request.token_ids:
            return _failed(index, version, f"token {self.poison_id} is poison")
        if reason := why_not_sampled(request, self.max_tokens, self.vocab_size):
            return _failed(index, version, reason)
        token = (sum(ids) + index + version) % self.vocab_size
        chunk = SampleChunk(index, (token,), (self._logprob(ids, token),), version)
        ids.append(token)
        finish: FinishReason | None = None
        if token in params.stop_token_ids:
            finish = "stop"
        elif len(ids) - prompt == min(params.max_tokens, self.max_tokens - prompt):
            finish = "length"
        if finish is None:
            return chunk
        fed = len(ids) - 1  # the last token was sampled and is no input
        own = fed if index == 0 else fed - prompt
        usage = Usage(fed, own, 0, own)
        reason = str(token) if finish == "stop" else ""
        return replace(chunk, finish_reason=finish, reason=reason, usage=usage)

    async def load_weights(self, directory: Path, policy_version: int) -> None:
        """Read nothing; fail when the directory is not there."""
        if not await asyncio.to_thread(directory.is_dir):
            raise FileNotFoundError(f"no checkpoint in {directory}")
        async with self._lock.swapping():
            self.policy_version = policy_version

    async def close(self) -> None:
        """Nothing is held."""


def _failed(index: int, version: int, reason: str) -> SampleChunk:
    return SampleChunk(index, (), (), version, "error", reason)
