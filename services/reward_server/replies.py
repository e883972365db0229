"""What became of rollouts, as protobuf."""

from collections.abc import Sequence

from services.reward_server.engines import EngineInfo, Usage
from services.reward_server.requests import Limits, RolloutResult, Status
from turnwise import __version__
from turnwise.v1 import reward_pb2 as pb

STATUSES: dict[Status, pb.RolloutStatus.ValueType] = {
    "OK": pb.ROLLOUT_STATUS_OK,
    "INVALID": pb.ROLLOUT_STATUS_INVALID,
    "DEADLINE": pb.ROLLOUT_STATUS_DEADLINE,
    "OVERLOADED": pb.ROLLOUT_STATUS_OVERLOADED,
    "ERROR": pb.ROLLOUT_STATUS_ERROR,
}


def to_response(
    results: Sequence[RolloutResult], version: int, route: str
) -> pb.ScoreTurnsResponse:
    usage = sum((result.usage for result in results), Usage())
    return pb.ScoreTurnsResponse(
        scores=[to_score(result) for result in results],
        policy_version=version,
        route=route,
        usage=to_usage(usage),
    )


def to_score(result: RolloutResult, first_prefix: int = 0) -> pb.RolloutScore:
    """The prefixes from `first_prefix` on, with the gains of the turns that end with them."""
    score = pb.RolloutScore(
        rollout_id=result.rollout_id, status=STATUSES[result.status], reason=result.reason
    )
    if result.status != "OK":
        return score
    for k in range(first_prefix, len(result.scores)):
        prefix = score.prefixes.add(score=result.scores[k])
        for a, alias in enumerate(result.answer_scores[k]):
            logprobs = result.token_logprobs[k][a] if result.token_logprobs else ()
            prefix.answers.add(score=alias, token_logprobs=logprobs)
    score.gains.extend(result.gains[max(first_prefix - 1, 0) :])
    score.policy_version, score.route = result.policy_version, result.route
    score.usage.CopyFrom(to_usage(result.usage))
    score.answer_leaked = result.answer_leaked
    return score


def to_usage(usage: Usage) -> pb.Usage:
    return pb.Usage(
        tokens_total=usage.tokens_total,
        tokens_unique=usage.tokens_unique,
        tokens_cached=usage.tokens_cached,
        tokens_computed=usage.tokens_computed,
    )


def to_info(
    engine: EngineInfo, version: int, reference: EngineInfo | None, limits: Limits
) -> pb.GetServerInfoResponse:
    return pb.GetServerInfoResponse(
        server_version=__version__,
        model=engine.model,
        reference_model=reference.model if reference else "",
        policy_version=version,
        engine=engine.engine,
        route=engine.route,
        dtype=engine.dtype,
        device=engine.device,
        vocab_size=engine.vocab_size,
        max_tokens=engine.max_tokens,
        limits=pb.ServerLimits(
            max_request_bytes=limits.max_request_bytes,
            max_rollouts=limits.max_rollouts,
            max_prefixes=limits.max_prefixes,
            max_answers=limits.max_answers,
            max_queued_tokens=limits.max_queued_tokens,
            max_samples=limits.max_samples,
            max_running_samples=limits.max_running_samples,
            max_sessions=limits.max_sessions,
        ),
    )
