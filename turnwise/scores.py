"""The scores of one rollout: answer log-probs -> score of a prefix -> gains of the turns."""

from collections.abc import Sequence
from itertools import pairwise
from math import exp, log
from statistics import fmean
from typing import Literal, get_args

from turnwise.credit_batch import LIMITS
from turnwise.errors import InvalidInput, require_number, require_one_of

GainKind = Literal["log_prob", "prob"]
AliasRule = Literal["max", "first", "logsumexp", "mean"]


def answer_score(token_logprobs: Sequence[float]) -> float:
    """Return the mean log-prob (nats per token) of the answer's tokens under one prefix."""
    _require_scores("token_logprobs", token_logprobs)
    return fmean(token_logprobs)


def alias_score(scores: Sequence[float], rule: AliasRule) -> float:
    """Return one score for a prefix from those of the answer's distinct aliases."""
    require_one_of("rule", rule, get_args(AliasRule))
    _require_scores("scores", scores)
    if rule == "first":
        return scores[0]
    if rule == "mean":
        return fmean(scores)
    best = max(scores)
    if rule == "max":
        return best
    # The log of the mean of exp, not of the sum: never above the best alias.
    return best + log(fmean(exp(score - best) for score in scores))


def turn_gains(scores: Sequence[float | None], kind: GainKind = "log_prob") -> list[float | None]:
    """Return what each turn but the last of one rollout added; None next to a missing score."""
    require_one_of("kind", kind, get_args(GainKind))
    _require_scores("scores", [0.0 if score is None else score for score in scores])
    values = [exp(score) if kind == "prob" and score is not None else score for score in scores]
    return [None if a is None or b is None else b - a for a, b in pairwise(values)]


def _require_scores(place: str, scores: Sequence[float]) -> None:
    if not len(scores):
        raise InvalidInput(place, "is empty")
    for index, score in enumerate(scores):
        require_number(f"{place}[{index}]", score, *LIMITS["scores"])
