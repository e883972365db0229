"""What an engine is: token ids in, log-probs of answers and sampled tokens out.

An engine never pads a token, never decodes history and never answers with a number it did
not compute. It may assume that its input was validated at the server's border, except for
`max_tokens`, which it checks itself: only the engine knows the model.
"""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec

Route = Literal["trie", "forced_decode", "trace_replay", "prompt_logprobs", "fake"]
JobStatus = Literal["OK", "INVALID", "ERROR"]
FinishReason = Literal["stop", "length", "error"]


class AnswerIds(msgspec.Struct, frozen=True):
    """Wrapper head, answer and wrapper tail; only [scored_start, scored_end) is scored."""

    token_ids: tuple[int, ...]
    scored_start: int
    scored_end: int


class ScoreJob(msgspec.Struct, frozen=True):
    """One rollout: score every answer after every prefix token_ids[:end], in order."""

    token_ids: tuple[int, ...]
    prefix_ends: tuple[int, ...]  # increasing, each in 1..len(token_ids)
    answers: tuple[AnswerIds, ...]  # aliases, at least one


class Usage(msgspec.Struct, frozen=True):
    """Model input positions up to the one that predicts the last scored token; they add up."""

    tokens_total: int = 0  # one pass per prefix and answer, nothing shared
    tokens_unique: int = 0  # distinct trie positions: what sharing leaves
    tokens_cached: int = 0  # of those, already held from earlier calls
    tokens_computed: int = 0  # run through the model in this call, also when run again

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.tokens_total + other.tokens_total,
            self.tokens_unique + other.tokens_unique,
            self.tokens_cached + other.tokens_cached,
            self.tokens_computed + other.tokens_computed,
        )


class JobScore(msgspec.Struct, frozen=True):
    """logprobs[k][a]: token log-probs (nats) of answer a's scored span after prefix k.

    Empty unless the status is OK: a job is scored whole or not at all.
    """

    status: JobStatus
    reason: str = ""
    logprobs: tuple[tuple[tuple[float, ...], ...], ...] = ()
    usage: Usage = Usage()  # a token shared by several jobs counts once, for the first of them


class ScoreResult(msgspec.Struct, frozen=True):
    """One JobScore per job, in order, all by one policy version over one route."""

    jobs: tuple[JobScore, ...]
    policy_version: int
    route: Route

    @property
    def usage(self) -> Usage:
        return sum((job.usage for job in self.jobs), Usage())


class SampleParams(msgspec.Struct, frozen=True):
    """How to continue a prompt: nothing stops a sequence but what is named here.

    Reported log-probs are always those of the raw distribution.
    """

    max_tokens: int
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps the whole vocabulary
    stop_token_ids: tuple[int, ...] = ()  # the one met stays in the output
    stop_strings: tuple[str, ...] = ()  # sampling ends with the token that completes one
    seed: int | None = None  # sequence i of n draws from seed + i; None draws afresh
    n: int = 1


class SampleRequest(msgspec.Struct, frozen=True):
    token_ids: tuple[int, ...]
    params: SampleParams


class SampleChunk(msgspec.Struct, frozen=True):
    """New tokens of sequence `index` (0..n-1) of one request; the last chunk says why it ended."""

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    policy_version: int
    finish_reason: FinishReason | None = None
    reason: str = ""  # the matched stop string or id, or what went wrong
    usage: Usage = Usage()  # with the last chunk; prompt and sampled positions


class EngineInfo(msgspec.Struct, frozen=True):
    engine: Literal["torch", "vllm", "fake"]
    model: str
    route: Route
    dtype: str
    device: str
    vocab_size: int
    max_tokens: int  # longest sequence, answer included, that the model can do exactly
    cache_bytes: int = 0  # KV bytes held now
    cache_limit_bytes: int = 0
    memory_bytes: int = 0  # weights and caches; GPU memory where there is one


class EngineUnhealthy(RuntimeError):
    """The engine cannot vouch for its weights any more and answers nothing."""


class Engine(Protocol):
    policy_version: int

    def info(self) -> EngineInfo: ...

    async def score(self, jobs: Sequence[ScoreJob]) -> ScoreResult:
        """Score all jobs under the policy version now served. Cancelling frees the work."""

    def sample(self, request: SampleRequest) -> AsyncIterator[SampleChunk]:
        """Continue one prompt n times under one policy version; closing it frees the work."""

    async def load_weights(self, directory: Path, policy_version: int) -> None:
        """Serve the checkpoint in `directory` from the next call on; calls under way finish first.

        Raises InvalidInput and goes on serving the old weights when it is unusable; raises
        EngineUnhealthy, then and for ever after, when it failed half-way.
        """

    async def close(self) -> None: ...
