"""ScoreSession: one rollout scored while it unfolds, every step through the scorer's queue."""

from collections.abc import Sequence
from typing import cast

from msgspec.structs import replace

from services.reward_server.border import (
    check_answers,
    check_ids,
    check_length,
    check_options,
    check_spans,
)
from services.reward_server.call import Unscored
from services.reward_server.engines import Engine, EngineInfo, JobScore, ScoreJob, ScoreResult
from services.reward_server.engines.session import ScoringSession, SessionUpdate
from services.reward_server.engines.usage import count_tokens
from services.reward_server.errors import InvalidRequest, Overloaded
from services.reward_server.leak import Span, answer_leaked
from services.reward_server.replies import to_score
from services.reward_server.requests import CheckedRollout, Limits, RolloutResult, ScoreOptions
from services.reward_server.results import Logprobs, call_usages, to_result
from services.reward_server.scorer import Scorer
from services.reward_server.scoring import Backend
from turnwise.errors import InvalidInput
from turnwise.v1 import reward_pb2 as pb


class NotScoredError(Exception):
    """A step that the scorer did not score; the session is as it was before it."""

    def __init__(self, unscored: Unscored) -> None:
        super().__init__(unscored.reason)
        self.unscored = unscored


class QueuedEngine:
    """What a ScoringSession asks of an engine, answered by the scorer."""

    def __init__(self, scorer: Scorer, client: str) -> None:
        self.scorer, self.client = scorer, client
        self.deadline = 0.0  # loop time, of the step under way

    async def score(self, jobs: Sequence[ScoreJob]) -> ScoreResult:
        costs = [usage.tokens_unique for usage in count_tokens(jobs)]
        done = await self.scorer.score(jobs, costs, self.deadline, self.client)
        scores = []
        for score in done.jobs:
            if isinstance(score, Unscored):
                raise NotScoredError(score)
            scores.append(score)
        usages = call_usages(costs, [score.usage for score in scores])
        scores = [replace(s, usage=u) for s, u in zip(scores, usages, strict=True)]
        return ScoreResult(tuple(scores), done.policy_version, self.scorer.engine.info().route)


class Session:
    """One stream: open, extend..., close. A step that is refused changes nothing."""

    def __init__(self, backend: Backend, limits: Limits, client: str) -> None:
        self._backend, self._limits, self._client = backend, limits, client
        self._scoring: ScoringSession | None = None  # None until open succeeded
        self._rollout_id, self._group_id = "", ""
        self._options = ScoreOptions()
        self._spans: tuple[Span, ...] = ()
        self._logprobs: Logprobs = ()
        self._route = ""

    async def step(
        self, request: pb.ScoreSessionRequest, deadline: float
    ) -> pb.ScoreSessionResponse:
        """Answer one message; InvalidRequest when the order of messages is wrong."""
        kind = request.WhichOneof("step")
        if kind is None or (kind == "open") == (self._scoring is not None):
            wanted = "open, once and first; then extend or close"
            raise InvalidRequest(f"step: expected {wanted}, got {kind}")
        if kind == "close":
            return self._close()
        try:
            if kind == "open":
                update = await self._open(request.open, deadline)
            else:
                update = await self._extend(request.extend, deadline)
        except InvalidInput as error:
            return self._refuse(Unscored("INVALID", str(error)))
        except Overloaded as error:
            return self._refuse(Unscored("OVERLOADED", str(error)))
        except NotScoredError as error:
            return self._refuse(error.unscored)
        if update.score.status != "OK":
            return self._refuse(Unscored(update.score.status, update.score.reason))
        return self._reply(update)

    async def _open(self, request: pb.SessionOpen, deadline: float) -> SessionUpdate:
        options = check_options(request.options)
        scorer = self._backend.scorer_for(options)
        info = scorer.engine.info()
        self._rollout_id, self._group_id = request.rollout_id, request.group_id
        ids = check_ids("token_ids", request.token_ids, info)
        answers = check_answers(request.answers, self._limits, info)
        check_length(ScoreJob(ids, (len(ids),), answers), info)
        if problem := await self._backend.wait_for(options, deadline):
            raise NotScoredError(Unscored("DEADLINE", problem))
        engine = QueuedEngine(scorer, self._client)
        # A session only ever asks its engine to score.
        scoring = ScoringSession(cast(Engine, engine), answers)
        engine.deadline = deadline
        update = await scoring.extend(ids)
        if update.score.status == "OK":
            self._scoring, self._options = scoring, options
        return update

    async def _extend(self, request: pb.SessionExtend, deadline: float) -> SessionUpdate:
        scoring = self._opened()
        engine = cast(QueuedEngine, scoring.engine)
        info: EngineInfo = engine.scorer.engine.info()
        start = len(scoring.token_ids)
        ids = check_ids("token_ids", request.token_ids, info)
        spans = check_spans(request.policy_spans, len(ids))
        ends = (*scoring.prefix_ends, start + len(ids))
        if len(ends) > (limit := self._limits.max_prefixes):
            raise InvalidInput("prefixes", f"{len(ends)} exceed the limit max_prefixes={limit}")
        check_length(ScoreJob((), ends, scoring.answers), info)
        engine.deadline = deadline
        update = await scoring.extend(ids)
        if update.score.status == "OK":
            self._spans += tuple((start + first, start + end) for first, end in spans)
        return update

    def _opened(self) -> ScoringSession:
        assert self._scoring is not None  # step() looked
        return self._scoring

    def _reply(self, update: SessionUpdate) -> pb.ScoreSessionResponse:
        self._logprobs = self._logprobs[: update.first_prefix] + update.score.logprobs
        self._route = update.route
        result = replace(self._result(), usage=update.score.usage)
        score = to_score(result, update.first_prefix)
        return pb.ScoreSessionResponse(
            score=score, first_prefix=update.first_prefix, provisional=True
        )

    def _close(self) -> pb.ScoreSessionResponse:
        return pb.ScoreSessionResponse(score=to_score(self._result()))

    def _result(self) -> RolloutResult:
        """Every prefix so far, all by the version of the last step."""
        scoring = self._opened()
        job = ScoreJob(scoring.token_ids, scoring.prefix_ends, scoring.answers)
        rollout = CheckedRollout(
            self._rollout_id, self._group_id, job, answer_leaked(job, self._spans)
        )
        score = JobScore("OK", "", self._logprobs)
        version = scoring.policy_version or 0
        return to_result(rollout, score, scoring.usage, self._options, version, self._route)

    def _refuse(self, unscored: Unscored) -> pb.ScoreSessionResponse:
        result = RolloutResult(self._rollout_id, unscored.status, unscored.reason)
        return pb.ScoreSessionResponse(score=to_score(result), provisional=True)
