"""What a model cannot take, in words: the one check that only an engine can make."""

from itertools import chain

from services.reward_server.engines import SampleRequest, ScoreJob


def why_invalid(job: ScoreJob, max_tokens: int, vocab_size: int) -> str:
    """Return why the model cannot score a job, or an empty string."""
    tokens = job.prefix_ends[-1] + max(answer.scored_end for answer in job.answers)
    if tokens > max_tokens:
        return f"{tokens} tokens with the answer exceed the limit of {max_tokens}"
    # The border knows the vocabulary as well; but here one bad id could end the engine.
    highest = max(chain(job.token_ids, *(answer.token_ids for answer in job.answers)))
    return outside(highest, vocab_size)


def why_not_sampled(request: SampleRequest, max_tokens: int, vocab_size: int) -> str:
    """Return why the model cannot continue a prompt, or an empty string."""
    size = len(request.token_ids)
    if size >= max_tokens:
        return f"a prompt of {size} tokens leaves no room under the limit of {max_tokens}"
    return outside(max(request.token_ids), vocab_size)


def outside(token_id: int, vocab_size: int) -> str:
    if token_id >= vocab_size:
        return f"token id {token_id} is outside the vocabulary of {vocab_size}"
    return ""
