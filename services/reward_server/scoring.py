"""One ScoreTurns call from end to end: border, queue, engine, results."""

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from services.reward_server.border import check_options, check_rollouts
from services.reward_server.call import CallScores, Unscored
from services.reward_server.engines import Engine, EngineUnhealthy, JobScore, Usage
from services.reward_server.engines.usage import count_tokens
from services.reward_server.errors import InvalidRequest, NotReady
from services.reward_server.policy import PolicyManager
from services.reward_server.replies import to_response
from services.reward_server.requests import CheckedRollout, Limits, RolloutResult, ScoreOptions
from services.reward_server.results import call_usages, to_result
from services.reward_server.scorer import Scorer
from turnwise.v1 import reward_pb2 as pb

LARGE_BYTES = 1 << 15  # a message from this size on is worked on in a thread
Result = TypeVar("Result")


class Backend(NamedTuple):
    """What there is to score and sample with, once it is loaded."""

    engine: Engine
    scorer: Scorer
    policy: PolicyManager
    reference: Scorer | None = None

    def scorer_for(self, options: ScoreOptions) -> Scorer:
        if options.scorer == "policy":
            return self.scorer
        if self.reference is None:
            raise InvalidRequest("options.scorer: this server has no reference model")
        return self.reference

    async def wait_for(self, options: ScoreOptions, deadline: float) -> str:
        """Wait for min_policy_version; return why not, if not. The reference never changes."""
        least = options.min_policy_version
        if options.scorer == "reference" or await self.has_version(least, deadline):
            return ""
        served = self.policy.version
        return f"min_policy_version {least} was not served in time, {served} is"

    async def has_version(self, least: int, deadline: float) -> bool:
        try:
            return least <= self.policy.version or await self.policy.wait_for(least, deadline)
        except EngineUnhealthy as error:
            raise NotReady(str(error)) from error


async def score_request(
    request: pb.ScoreTurnsRequest, backend: Backend, limits: Limits, deadline: float, client: str
) -> tuple[pb.ScoreTurnsResponse, list[RolloutResult]]:
    """Return the reply and what it says, rollout by rollout; `deadline` in loop time."""
    options = check_options(request.options)
    scorer = backend.scorer_for(options)
    size = request.ByteSize()
    checked = await apart(size, check_rollouts, request, limits, scorer.engine.info())
    rollouts = [rollout for rollout in checked if isinstance(rollout, CheckedRollout)]
    scored: dict[int, RolloutResult] = {}
    version, route = scorer.engine.policy_version, ""
    if rollouts and (problem := await backend.wait_for(options, deadline)):
        scored = {id(r): RolloutResult(r.rollout_id, "DEADLINE", problem) for r in rollouts}
    elif rollouts:
        jobs = [rollout.job for rollout in rollouts]
        counted = await apart(size, count_tokens, jobs)
        costs = [usage.tokens_unique for usage in counted]
        scores = await scorer.score(jobs, costs, deadline, client)
        version, route = scores.policy_version, scores.route
        results = await apart(size, to_results, rollouts, costs, scores, options)
        scored = {id(r): result for r, result in zip(rollouts, results, strict=True)}
    done = [r if isinstance(r, RolloutResult) else scored[id(r)] for r in checked]
    route = route or scorer.engine.info().route
    return await apart(size, to_response, done, version, route), done


async def apart(size: int, work: Callable[..., Result], *args: object) -> Result:
    """Do what takes long in a thread, so that small calls are answered meanwhile."""
    return await asyncio.to_thread(work, *args) if size >= LARGE_BYTES else work(*args)


def to_results(
    rollouts: Sequence[CheckedRollout],
    costs: Sequence[int],
    scores: CallScores,
    options: ScoreOptions,
) -> list[RolloutResult]:
    usages = [_usage(score) for score in scores.jobs]  # None: it has no scores
    needed = [0 if usage is None else cost for cost, usage in zip(costs, usages, strict=True)]
    shared = call_usages(needed, [usage or Usage() for usage in usages])
    return [
        to_result(rollout, score, usage, options, scores.policy_version, scores.route)
        for rollout, score, usage in zip(rollouts, scores.jobs, shared, strict=True)
    ]


def _usage(score: JobScore | Unscored) -> Usage | None:
    return score.usage if isinstance(score, JobScore) and score.status == "OK" else None
