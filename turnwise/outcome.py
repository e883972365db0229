"""The outcome of a rollout: is its answer well-formed, and how near is it to the references?

Only the policy's own faults cost the format penalty. A deadline or a failing tool is no fault of
the policy: the caller records the outcome None then, and the rollout is masked.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Literal, get_args

import msgspec

from turnwise.errors import InvalidInput, require_one_of

F1Mode = Literal["squad", "token_sets"]
Metric = Literal[F1Mode, "exact_match"]

ARTICLES = re.compile(r"\b(a|an|the)\b")
DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)
SPACE_PUNCTUATION = str.maketrans(string.punctuation, " " * len(string.punctuation))


class AnswerFormat(msgspec.Struct, frozen=True):
    """How the policy marks its prediction, and what may follow it."""

    tag: str = "answer"
    endings: tuple[str, ...] = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>")


DEFAULT_FORMAT = AnswerFormat()


class Judgement(msgspec.Struct, frozen=True):
    """The prediction of a well-formed rollout, or else its fault in words."""

    prediction: str | None = None
    fault: str | None = None


def f1(prediction: str, answer: str, mode: F1Mode = "squad") -> float:
    """Return the word-level F1; when one text has no words, 1 if neither has and 0 otherwise."""
    require_one_of("mode", mode, get_args(F1Mode))
    predicted, wanted = _words(prediction, mode), _words(answer, mode)
    if not predicted or not wanted:
        return float(predicted == wanted)
    common = (predicted & wanted).total()
    return 2 * common / (predicted.total() + wanted.total())


def exact_match(prediction: str, answer: str) -> float:
    """Return 1 when the texts are equal after the normalisation of `squad`, else 0."""
    return float(_squad_words(prediction) == _squad_words(answer))


def _words(text: str, mode: F1Mode) -> Counter[str]:
    if mode == "token_sets":
        return Counter(set(text.lower().translate(SPACE_PUNCTUATION).split()))
    return Counter(_squad_words(text))


def _squad_words(text: str) -> list[str]:
    # Punctuation first, then articles, as in SQuAD's own script: "U.S." is "us", "the." is "".
    return ARTICLES.sub(" ", text.lower().translate(DELETE_PUNCTUATION)).split()


def policy_texts(
    token_ids: Sequence[int],
    policy_mask: Sequence[bool],
    turn_spans: Sequence[tuple[int, int]],
    decode: Callable[[list[int]], str],
) -> list[str]:
    """Return one text per run of policy tokens; turns and tool responses keep them apart."""
    if len(token_ids) != len(policy_mask):
        problem = f"holds {len(policy_mask)} values for {len(token_ids)} tokens"
        raise InvalidInput("policy_mask", problem)
    texts = []
    for start, end in turn_spans:
        pairs = zip(token_ids[start:end], policy_mask[start:end], strict=True)
        for policy, run in groupby(pairs, key=lambda pair: bool(pair[1])):
            if policy:
                texts.append(decode([token for token, _ in run]))
    return texts


def judge(texts: Sequence[str], answer_format: AnswerFormat = DEFAULT_FORMAT) -> Judgement:
    """Return the prediction if the last text, and no earlier one, holds exactly one answer."""
    opening, closing = f"<{answer_format.tag}>", f"</{answer_format.tag}>"
    if not texts:
        return Judgement(fault="the policy said nothing")
    if any(tag in text for text in texts[:-1] for tag in (opening, closing)):
        return Judgement(fault=f"{opening} or {closing} stands before the last turn")
    counts = texts[-1].count(opening), texts[-1].count(closing)
    if counts == (0, 0):
        return Judgement(fault=f"the last turn has no {opening}")
    if counts != (1, 1):
        found = f"{counts[0]} {opening} and {counts[1]} {closing}"
        return Judgement(fault=f"the last turn has {found} instead of one each")
    before, _, rest = texts[-1].partition(opening)
    prediction, _, after = rest.partition(closing)
    if closing in before:
        return Judgement(fault=f"{closing} stands before {opening}")
    if not prediction.strip():
        return Judgement(fault="the answer is empty")
    for ending in answer_format.endings:
        after = after.replace(ending, "")
    if after.strip():
        return Judgement(fault=f"text follows {closing}")
    return Judgement(prediction=prediction.strip())


def outcome(
    judgement: Judgement,
    answers: Sequence[str],
    metric: Metric = "squad",
    format_penalty: float = -1.0,
) -> float:
    """Return the metric against the best alias, or the format penalty on a fault."""
    require_one_of("metric", metric, get_args(Metric))
    if not answers:
        raise InvalidInput("answers", "is empty")
    if judgement.prediction is None:
        return format_penalty
    prediction = judgement.prediction
    if metric == "exact_match":
        return max(exact_match(prediction, answer) for answer in answers)
    return max(f1(prediction, answer, metric) for answer in answers)
