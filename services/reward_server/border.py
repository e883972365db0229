"""The border: what a score request must be. Code behind it trusts what it gets.

A rollout that breaks a rule becomes an INVALID result of its own, which names field and limit;
only what concerns the whole call raises InvalidRequest.
"""

from collections.abc import Sequence
from itertools import pairwise

from services.reward_server.engines import AnswerIds, EngineInfo, ScoreJob
from services.reward_server.errors import InvalidRequest
from services.reward_server.leak import Span, answer_leaked
from services.reward_server.requests import CheckedRollout, Limits, RolloutResult, ScoreOptions
from turnwise.errors import InvalidInput
from turnwise.scores import AliasRule, GainKind
from turnwise.v1 import reward_pb2 as pb

GAIN_KINDS: dict[int, GainKind] = {
    pb.GAIN_KIND_UNSPECIFIED: "log_prob",
    pb.GAIN_KIND_LOG_PROB: "log_prob",
    pb.GAIN_KIND_PROB: "prob",
}
ALIAS_RULES: dict[int, AliasRule] = {
    pb.ALIAS_RULE_UNSPECIFIED: "max",
    pb.ALIAS_RULE_FIRST: "first",
    pb.ALIAS_RULE_MAX: "max",
    pb.ALIAS_RULE_LOGSUMEXP: "logsumexp",
    pb.ALIAS_RULE_MEAN: "mean",
}
SCORERS = (pb.SCORER_UNSPECIFIED, pb.SCORER_POLICY, pb.SCORER_REFERENCE)


def check_options(options: pb.ScoreOptions) -> ScoreOptions:
    """Enums are open on the wire: a number that names nothing is refused."""
    try:
        gain_kind, alias_rule = GAIN_KINDS[options.gain_kind], ALIAS_RULES[options.alias_rule]
    except KeyError as error:
        raise InvalidRequest(f"options: {error} names no gain kind or alias rule") from None
    if options.scorer not in SCORERS:
        raise InvalidRequest(f"options.scorer: {options.scorer} names no scorer")
    return ScoreOptions(
        gain_kind,
        alias_rule,
        "reference" if options.scorer == pb.SCORER_REFERENCE else "policy",
        options.token_logprobs,
        options.min_policy_version,
    )


def check_rollouts(
    request: pb.ScoreTurnsRequest, limits: Limits, engine: EngineInfo
) -> list[CheckedRollout | RolloutResult]:
    """Return every rollout in order, ready to be scored or INVALID."""
    count = len(request.rollouts)
    if not count:
        raise InvalidRequest("rollouts: is empty")
    if count > limits.max_rollouts:
        raise InvalidRequest(
            f"rollouts: {count} exceed the limit max_rollouts={limits.max_rollouts}"
        )
    return [check_rollout(rollout, limits, engine) for rollout in request.rollouts]


def check_rollout(
    rollout: pb.Rollout, limits: Limits, engine: EngineInfo
) -> CheckedRollout | RolloutResult:
    try:
        job = ScoreJob(
            check_ids("token_ids", rollout.token_ids, engine),
            tuple(rollout.prefix_ends),
            check_answers(rollout.answers, limits, engine),
        )
        _check_prefix_ends(job, limits)
        check_length(job, engine)
        spans = check_spans(rollout.policy_spans, len(job.token_ids))
    except InvalidInput as error:
        return RolloutResult(rollout.rollout_id, "INVALID", str(error))
    return CheckedRollout(rollout.rollout_id, rollout.group_id, job, answer_leaked(job, spans))


def check_ids(place: str, ids: Sequence[int], engine: EngineInfo) -> tuple[int, ...]:
    token_ids = tuple(ids)
    if not token_ids:
        raise InvalidInput(place, "is empty")
    if (highest := max(token_ids)) >= engine.vocab_size:
        where = f"{place}[{token_ids.index(highest)}]"
        raise InvalidInput(where, f"id {highest} exceeds the limit vocab_size={engine.vocab_size}")
    return token_ids


def check_answers(
    answers: Sequence[pb.Answer], limits: Limits, engine: EngineInfo
) -> tuple[AnswerIds, ...]:
    if not answers:
        raise InvalidInput("answers", "is empty")
    if len(answers) > limits.max_answers:
        limit = f"max_answers={limits.max_answers}"
        raise InvalidInput("answers", f"{len(answers)} exceed the limit {limit}")
    return tuple(_check_answer(f"answers[{i}]", a, engine) for i, a in enumerate(answers))


def _check_answer(place: str, answer: pb.Answer, engine: EngineInfo) -> AnswerIds:
    ids = check_ids(f"{place}.token_ids", answer.token_ids, engine)
    start, end = answer.scored_start, answer.scored_end or len(ids)
    if not start < end <= len(ids):
        problem = f"[{start}, {end}) is no span of its {len(ids)} tokens"
        raise InvalidInput(f"{place}.scored_start and scored_end", problem)
    return AnswerIds(ids, start, end)


def _check_prefix_ends(job: ScoreJob, limits: Limits) -> None:
    ends, length = job.prefix_ends, len(job.token_ids)
    if not ends:
        raise InvalidInput("prefix_ends", "is empty")
    if len(ends) > limits.max_prefixes:
        limit = f"max_prefixes={limits.max_prefixes}"
        raise InvalidInput("prefix_ends", f"{len(ends)} exceed the limit {limit}")
    for k, (before, end) in enumerate(pairwise((0, *ends))):
        if not before < end <= length:
            problem = f"must be in {before + 1}..{length}, got {end}"
            raise InvalidInput(f"prefix_ends[{k}]", problem)


def check_length(job: ScoreJob, engine: EngineInfo) -> None:
    tokens = job.prefix_ends[-1] + max(answer.scored_end for answer in job.answers)
    if tokens > engine.max_tokens:
        problem = f"{tokens} tokens with the answer exceed the limit max_tokens={engine.max_tokens}"
        raise InvalidInput("prefix_ends", problem)


def check_spans(spans: Sequence[pb.TokenSpan], length: int) -> tuple[Span, ...]:
    checked: list[Span] = []
    before = 0
    for i, span in enumerate(spans):
        if not before <= span.start < span.end <= length:
            problem = f"must be a span within {before}..{length}, got [{span.start}, {span.end})"
            raise InvalidInput(f"policy_spans[{i}]", problem)
        checked.append((span.start, span.end))
        before = span.end
    return tuple(checked)
