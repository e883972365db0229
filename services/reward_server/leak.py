"""Does an answer already stand where the policy could copy it from without searching?"""

from array import array
from collections.abc import Iterable, Sequence

from services.reward_server.engines import ScoreJob

Span = tuple[int, int]  # [start, end) of token ids


def answer_leaked(job: ScoreJob, policy_spans: Sequence[Span]) -> bool:
    """Whether an answer's scored tokens stand in the prompt or in the policy's earlier text.

    The prompt is prefix 0; earlier text is what the policy wrote after it and before the last
    prefix ends. An answer inside a tool response is no leak: finding it there is the gain.
    Token ids are compared, so the same words in another tokenisation go unnoticed.
    """
    prompt, last = job.prefix_ends[0], job.prefix_ends[-1]
    own = ((max(start, prompt), min(end, last)) for start, end in policy_spans)
    texts = [_bytes(job.token_ids[start:end]) for start, end in ((0, prompt), *own) if start < end]
    answers = {a.token_ids[a.scored_start : a.scored_end] for a in job.answers}
    return any(_contains(text, _bytes(answer)) for answer in answers for text in texts)


def _bytes(ids: Iterable[int]) -> bytes:
    return array("I", ids).tobytes()


def _contains(text: bytes, part: bytes) -> bool:
    """Find whole ids only: a match of bytes that begins inside an id is none."""
    size = array("I").itemsize
    at = text.find(part)
    while at >= 0 and at % size:
        at = text.find(part, at + 1)
    return at >= 0
