"""From an engine's log-probs to what became of a rollout: scores by the alias rule, and gains."""

from collections.abc import Sequence
from statistics import fmean

from msgspec.structs import replace

from services.reward_server.call import Unscored
from services.reward_server.engines import JobScore, ScoreJob, Usage
from services.reward_server.requests import CheckedRollout, RolloutResult, ScoreOptions
from turnwise.credit_batch import LIMITS
from turnwise.scores import alias_score, turn_gains

LEAST, MOST = LIMITS["scores"]  # nats; rounding may lift a certain token a little above 0
Logprobs = tuple[tuple[tuple[float, ...], ...], ...]  # [prefix][alias][token]


def to_result(
    rollout: CheckedRollout,
    score: JobScore | Unscored,
    usage: Usage,
    options: ScoreOptions,
    version: int,
    route: str,
) -> RolloutResult:
    """Return scores and gains, or ERROR when a number is not a score."""
    if isinstance(score, Unscored) or score.status != "OK":
        return RolloutResult(rollout.rollout_id, score.status, score.reason)
    if problem := _problem(rollout.job, score.logprobs):
        return RolloutResult(rollout.rollout_id, "ERROR", problem)
    answer_scores = tuple(tuple(map(fmean, answers)) for answers in score.logprobs)
    distinct = _distinct(rollout.job)
    scores = tuple(
        alias_score([of_prefix[a] for a in distinct], options.alias_rule)
        for of_prefix in answer_scores
    )
    gains = turn_gains(scores, options.gain_kind)
    return RolloutResult(
        rollout.rollout_id,
        "OK",
        scores=scores,
        answer_scores=answer_scores,
        token_logprobs=score.logprobs if options.token_logprobs else (),
        gains=tuple(gain for gain in gains if gain is not None),  # no score is missing: none is
        policy_version=version,
        route=route,
        usage=usage,
        answer_leaked=rollout.answer_leaked,
    )


def _problem(job: ScoreJob, logprobs: Logprobs) -> str:
    """What keeps the engine's numbers from being scores; empty when nothing does."""
    spans = [answer.scored_end - answer.scored_start for answer in job.answers]
    shape = [[len(tokens) for tokens in answers] for answers in logprobs]
    if shape != [spans] * len(job.prefix_ends):
        return "the engine returned log-probs of the wrong shape"
    for k, answers in enumerate(logprobs):
        for a, tokens in enumerate(answers):
            for value in tokens:
                if not LEAST <= value <= MOST:  # NaN fails every comparison
                    return f"prefix {k}, answer {a}: log-prob {value} is not a score"
    return ""


def _distinct(job: ScoreJob) -> list[int]:
    """The first alias of each kind: what is said twice does not count twice."""
    first: dict[object, int] = {}
    for i, answer in enumerate(job.answers):
        first.setdefault((answer.token_ids[: answer.scored_end], answer.scored_start), i)
    return list(first.values())


def call_usages(costs: Sequence[int], usages: Sequence[Usage]) -> list[Usage]:
    """Tell each job's usage within its own call, whatever else shared a batch with it.

    An engine counts per batch: jobs of other calls may have brought, or taken, what is shared.
    What the call needed and no job of it computed was there, or was computed for another.
    """
    held = max(0, sum(costs) - sum(usage.tokens_computed for usage in usages))
    shared = []
    for cost, usage in zip(costs, usages, strict=True):
        cached = min(held, max(0, cost - usage.tokens_computed))
        held -= cached
        shared.append(replace(usage, tokens_unique=cost, tokens_cached=cached))
    return shared
