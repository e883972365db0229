"""A scoring session: one rollout scored as it unfolds, over any engine that keeps its cache."""

from collections.abc import Sequence

import msgspec

from services.reward_server.engines import AnswerIds, Engine, JobScore, Route, ScoreJob, Usage


class SessionUpdate(msgspec.Struct, frozen=True):
    """Scores of prefixes first_prefix..; from 0 when the version changed and all were redone."""

    first_prefix: int
    score: JobScore
    policy_version: int
    route: Route


class ScoringSession:
    """`extend` by the tokens of each turn; the engine's cache makes every step cost only them.

    All prefixes of a session count as scored only under the version of its last update:
    earlier updates under another version are provisional, and a version change re-scores
    every prefix at once.
    """

    def __init__(self, engine: Engine, answers: Sequence[AnswerIds]) -> None:
        self.engine = engine
        self.answers = tuple(answers)
        self.token_ids: tuple[int, ...] = ()
        self.prefix_ends: tuple[int, ...] = ()
        self.policy_version: int | None = None  # None until a prefix was scored
        self.usage = Usage()

    async def extend(self, token_ids: Sequence[int]) -> SessionUpdate:
        """Append the prompt (first call) or one turn, and score the prefix that it ends."""
        ids = (*self.token_ids, *token_ids)
        ends = (*self.prefix_ends, len(ids))
        first = len(ends) - 1
        result = await self.engine.score([ScoreJob(ids, ends[first:], self.answers)])
        if first and result.policy_version != self.policy_version:
            first = 0
            result = await self.engine.score([ScoreJob(ids, ends, self.answers)])
        score = result.jobs[0]
        if score.status == "OK":
            self.token_ids, self.prefix_ends = ids, ends
            self.policy_version = result.policy_version
            self.usage += score.usage
        return SessionUpdate(first, score, result.policy_version, result.route)
