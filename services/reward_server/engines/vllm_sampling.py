"""Ask vLLM for the sequences of a sample, pass their tokens on, and count what they cost."""

from collections.abc import Callable
from typing import Any

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind

from services.reward_server.engines import (
    AnswerIds,
    SampleChunk,
    SampleRequest,
    ScoreJob,
    Usage,
)
from services.reward_server.engines.limits import why_not_sampled
from services.reward_server.engines.usage import count_tokens
from services.reward_server.engines.vllm_scoring import bad_logprob, weights_label, wrong_weights

EMIT_TOKENS = 16  # a sequence reports after its first token, then so many, and when it ends


def sequence_requests(
    request: SampleRequest, max_tokens: int, vocab_size: int, has_tokenizer: bool
) -> list[tuple[list[int], SamplingParams]] | str:
    """Return prompt and parameters of every sequence, or why the request cannot be served."""
    prompt, params = list(request.token_ids), request.params
    if reason := why_not_sampled(request, max_tokens, vocab_size):
        return reason
    if params.stop_strings and not has_tokenizer:
        return "stop strings need a tokenizer, and the model's directory holds none"
    try:
        return [
            (
                prompt,
                SamplingParams(
                    temperature=params.temperature,
                    top_p=params.top_p,
                    top_k=params.top_k,
                    seed=None if params.seed is None else params.seed + index,
                    stop=list(params.stop_strings),
                    stop_token_ids=list(params.stop_token_ids),
                    ignore_eos=True,  # the caller names what stops; nothing else does
                    max_tokens=min(params.max_tokens, max_tokens - len(prompt)),
                    logprobs=0,  # those of the sampled tokens only
                    flat_logprobs=True,
                    detokenize=bool(params.stop_strings),
                    skip_special_tokens=False,  # a stop string may be a special token's
                    output_kind=RequestOutputKind.DELTA,
                    stream_interval=EMIT_TOKENS,
                ),
            )
            for index in range(params.n)
        ]
    except VLLMValidationError as error:
        return str(error)


class SampleStream:
    """One sample under one policy version: what vLLM sends for its sequences becomes chunks."""

    def __init__(
        self, request: SampleRequest, version: int, put: Callable[[SampleChunk], None]
    ) -> None:
        self._prompt = request.token_ids
        self._version = version
        self._put = put
        self._cached: dict[int, int] = {}  # leading positions that each sequence found cached
        self._ended: list[ScoreJob] = []  # one prompt and its sampled ids each

    def fail(self, index: int, reason: str) -> None:
        self._put(SampleChunk(index, (), (), self._version, "error", reason))

    async def forward(self, index: int, collector: Any) -> None:
        """Pass on a sequence's tokens until it ends; a token that is no number ends it too."""
        token_ids: list[int] = []
        while True:
            output = await collector.get()
            self._cached.setdefault(index, output.num_cached_tokens)
            sequence = output.outputs[0]
            logprobs = sequence.logprobs.logprobs if sequence.token_ids else []
            token_ids += sequence.token_ids
            if problem := bad_logprob(logprobs):
                return self.fail(index, problem)
            if output.finished:
                return self._end(index, sequence, logprobs, token_ids)
            self._put(SampleChunk(index, tuple(sequence.token_ids), tuple(logprobs), self._version))

    def _end(self, index: int, sequence: Any, logprobs: list[float], token_ids: list[int]) -> None:
        reason = "" if sequence.stop_reason is None else str(sequence.stop_reason)
        if sequence.finish_reason not in ("stop", "length"):
            return self.fail(index, f"vLLM ended the sequence: {sequence.finish_reason}")
        if problem := wrong_weights(sequence, weights_label(self._version)):
            return self.fail(index, problem)
        return self._put(
            SampleChunk(
                index,
                tuple(sequence.token_ids),
                tuple(logprobs),
                self._version,
                sequence.finish_reason,
                reason,
                self._usage(index, token_ids),
            )
        )

    def _usage(self, index: int, token_ids: list[int]) -> Usage:
        """Count what the sequence adds to those that ended before it.

        Its last token was sampled and is no input. The first to end has the prompt they share.
        """
        sampled = AnswerIds(tuple(token_ids), 0, len(token_ids))
        self._ended.append(ScoreJob(self._prompt, (len(self._prompt),), (sampled,)))
        counted = count_tokens(self._ended)[-1]
        # Sequences start in order, before any of them ends: the least that one found cached is
        # what the first found, and that came from earlier calls.
        earlier = min(self._cached.values()) if len(self._ended) == 1 else 0
        computed = counted.tokens_total - self._cached[index]
        return Usage(counted.tokens_total, counted.tokens_unique, earlier, computed)
