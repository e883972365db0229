"""One `score` call: what to send where, and what the replies mean. Touches no socket."""

from collections import deque
from collections.abc import Sequence
from hashlib import blake2b
from time import monotonic
from typing import Protocol
from uuid import uuid4

import grpc

from turnwise.client_channels import ClientOptions
from turnwise.endpoints import (
    MAX_FAILURES,
    Call,
    Endpoint,
    Outcome,
    Reach,
    Reply,
    backoff_s,
    next_move,
    retry_wait_s,
    to_error,
)
from turnwise.errors import (
    DeadlineExceeded,
    RequestRefused,
    RewardError,
    RewardOverloaded,
    StreamBroken,
)
from turnwise.rollout import Status
from turnwise.score_batches import Part, Size, batches, hard_limits, size_of
from turnwise.score_result import RolloutScore, ScoreResult, read_score
from turnwise.v1 import reward_pb2 as pb

MAX_RESCORES = 5  # how often a group is re-scored because the policy changed under it
GRACE_S = 1.0  # after the deadline, for a call that does not come back

_STATUS_OF: dict[type[RewardError], Status] = {
    DeadlineExceeded: "DEADLINE",
    RewardOverloaded: "OVERLOADED",
    RequestRefused: "INVALID",
}  # any other: ERROR


class Run(Protocol):
    """What a client is to do: it makes the calls of `start` and hands their replies to `finish`."""

    @property
    def done(self) -> bool: ...
    def start(self, now: float) -> list[Call]: ...
    def finish(self, call: Call, reply: Reply, now: float) -> None: ...
    def wait_s(self, now: float) -> float: ...


class FindRun:
    """Finds an endpoint for one key."""

    def __init__(self, reach: Reach, key: str) -> None:
        self.reach, self.key = reach, key
        self.endpoint: Endpoint | None = None
        self.error: RewardError | None = None
        self.finish, self.wait_s = reach.finish, reach.wait_s

    @property
    def done(self) -> bool:
        return bool(self.endpoint or self.error)

    def start(self, now: float) -> list[Call]:
        self.error = self.reach.give_up(now)
        self.endpoint = None if self.error else self.reach.pick(self.key, now)
        return self.reach.start(now)

    def found(self) -> Endpoint:
        if self.error:
            raise self.error
        assert self.endpoint
        return self.endpoint


class ScoreRun:
    """One `score` call: what to send where, and what the replies mean. Touches no socket."""

    def __init__(
        self,
        reach: Reach,
        rollouts: Sequence[pb.Rollout],
        wish: pb.ScoreOptions | None,
        options: ClientOptions,
    ) -> None:
        self.reach, self.rollouts, self.options = reach, rollouts, options
        self.wish = wish or pb.ScoreOptions()
        self.key = uuid4().hex
        self.sizes = [size_of(rollout) for rollout in rollouts]
        self.scores: list[RolloutScore | None] = [None] * len(rollouts)
        self.errors: list[RewardError] = []
        self.replies = 0
        self.groups: dict[str, list[int]] = {}
        for index, rollout in enumerate(rollouts):
            name = f"group {rollout.group_id}" if rollout.group_id else f"{self.key} {index}"
            self.groups.setdefault(name, []).append(index)
        self._queue = [Part(name, tuple(indices)) for name, indices in self.groups.items()]
        self._ready: deque[tuple[Endpoint, list[Part]]] = deque()
        self._flying: dict[str, list[Part]] = {}

    @property
    def done(self) -> bool:
        return not (self._queue or self._ready or self._flying)

    def result(self) -> ScoreResult:
        """The scores; raises only when no server gave a reply."""
        if self.errors and not self.replies:
            raise self.errors[0]
        return ScoreResult(tuple(score for score in self.scores if score))

    def start(self, now: float) -> list[Call]:
        """The calls to make now."""
        error = self.reach.give_up(now)
        if error:
            waiting = [*self._queue, *(part for _, batch in self._ready for part in batch)]
            self._queue, self._ready = [], deque()
            if now > self.reach.deadline + GRACE_S:  # gRPC should have ended its calls by itself
                waiting += [part for batch in self._flying.values() for part in batch]
                self._flying = {}
            self._fail(waiting, error)
            return []
        self._route(now)
        calls = []
        while self._ready and len(self._flying) < self.options.max_calls:
            endpoint, batch = self._ready.popleft()
            if endpoint.info is None:  # it failed while the batch lay here
                self._queue += batch
                self._route(now)
            else:
                calls.append(self._call(endpoint, batch, now))
        return [*self.reach.start(now), *calls]

    def _route(self, now: float) -> None:
        """Move what is due, and whose endpoint answers, from the queue into batches."""
        routed: dict[tuple[str, int, int], list[Part]] = {}
        queue, self._queue = self._queue, []
        for part in queue:
            endpoint = self.reach.pick(part.group, now) if part.due <= now else None
            if endpoint is None:
                self._queue.append(part)
            else:
                alike = endpoint.address, part.round, part.min_version
                routed.setdefault(alike, []).append(part)
        for (address, *_), parts in routed.items():
            endpoint = self.reach.router.endpoints[address]
            if endpoint.info is None:  # another thread lost it just now
                self._queue += parts
                continue
            hard = hard_limits(endpoint.info.limits)
            wanted = (self.options.max_batch_rollouts, self.options.max_batch_tokens, float("inf"))
            soft = Size(*(min(a, b) for a, b in zip(hard, wanted, strict=True)))
            for batch in batches(parts, self.sizes, soft, hard):
                self._ready.append((endpoint, batch))

    def _call(self, endpoint: Endpoint, batch: list[Part], now: float) -> Call:
        indices = [index for part in batch for index in part.indices]
        content = f"{batch[0].round} {batch[0].min_version} {indices}"
        key = f"{self.key}-{blake2b(content.encode(), digest_size=8).hexdigest()}"
        request = pb.ScoreTurnsRequest(options=self.wish, idempotency_key=key)
        request.rollouts.extend(self.rollouts[index] for index in indices)
        version = max(self.wish.min_policy_version, batch[0].min_version)
        request.options.min_policy_version = version
        self._flying[key] = batch
        return Call("ScoreTurns", endpoint, request, self.reach.deadline - now)

    def finish(self, call: Call, reply: Reply, now: float) -> None:
        if isinstance(call.request, pb.GetServerInfoRequest):
            self.reach.finish(call, reply, now)
            return
        batch = self._flying.pop(call.request.idempotency_key)
        given = len(call.request.rollouts)
        if isinstance(reply, pb.ScoreTurnsResponse) and len(reply.scores) != given:
            problem = f"sent {len(reply.scores)} scores for {given} rollouts"
            reply = Outcome(grpc.StatusCode.INTERNAL, problem)
        if isinstance(reply, pb.ScoreTurnsResponse):
            self.reach.answered(call.endpoint)
            self._take(batch, reply, now)
        elif isinstance(reply, Outcome):
            self._again(call.endpoint, batch, reply, now)

    def _again(self, endpoint: Endpoint, batch: list[Part], outcome: Outcome, now: float) -> None:
        """The call failed as a whole."""
        worst = max(batch, key=lambda part: part.losses)
        move = next_move(outcome, batch[0].waits + 1, self.reach.deadline - now)
        if move.kind == "elsewhere":
            if endpoint.info is not None:  # else it is known to be lost
                self.reach.failed(endpoint, outcome, now)
            spare = len(self.reach.router.endpoints) - 1
            late = worst.losses - spare
            if late < MAX_FAILURES:
                due = now + (backoff_s(late) if late > 0 else 0.0)
                self._queue += [part._replace(due=due, losses=part.losses + 1) for part in batch]
                return
        if move.kind == "wait":
            due = now + move.wait_s
            self._queue += [part._replace(due=due, waits=part.waits + 1) for part in batch]
            return
        if outcome.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            endpoint.info = None  # it may hang: probe it before its next use
        self._fail(batch, to_error(outcome, endpoint.address))

    def _take(self, batch: list[Part], reply: pb.ScoreTurnsResponse, now: float) -> None:
        scores = iter(reply.scores)
        self.replies += 1
        for part in batch:
            refused = []
            due = now + retry_wait_s(None, part.waits + 1)
            for index in part.indices:
                wire = next(scores)
                again = wire.status == pb.ROLLOUT_STATUS_OVERLOADED and due < self.reach.deadline
                if again:
                    refused.append(index)
                else:
                    self.scores[index] = read_score(wire, len(self.rollouts[index].prefix_ends))
            if refused:
                changed = part._replace(indices=tuple(refused), round=part.round + 1)
                self._queue.append(changed._replace(due=due, waits=part.waits + 1))
            self._settle(part)

    def _settle(self, part: Part) -> None:
        """Once a group is complete: one version for all of it, or those behind are re-scored."""
        found = [(index, self.scores[index]) for index in self.groups[part.group]]
        if any(score is None for _, score in found):
            return
        versions = {i: score.policy_version for i, score in found if score and score.ok}
        newest = max((version or 0 for version in versions.values()), default=0)
        old = tuple(index for index, version in versions.items() if version != newest)
        if not old:
            return
        round_, rescores = part.round + 1, part.rescores + 1
        again = Part(part.group, old, round=round_, rescores=rescores, min_version=newest)
        if rescores > MAX_RESCORES:
            tries = f"{rescores} tries to score its group by one version"
            self._fail([again], RewardError(f"the policy changed in {tries}; send the group again"))
            return
        for index in old:
            self.scores[index] = None
        self._queue.append(again)

    def _fail(self, parts: Sequence[Part], error: RewardError) -> None:
        if parts:
            self.errors.append(error)
        for index in (index for part in parts for index in part.indices):
            status = _STATUS_OF.get(type(error), "ERROR")
            number = pb.RolloutStatus.Value(f"ROLLOUT_STATUS_{status}")
            name = self.rollouts[index].rollout_id
            wire = pb.RolloutScore(rollout_id=name, status=number, reason=str(error))
            self.scores[index] = read_score(wire, 0)
        for part in parts:
            self._settle(part)

    def wait_s(self, now: float) -> float:
        due = min((part.due for part in self._queue if part.due > now), default=now + 3600.0)
        return min(self.reach.wait_s(now), due - now)


class Attempts:
    """Retries of a stream that has not begun; both clients ask it what to do next."""

    def __init__(self, reach: Reach) -> None:
        self.reach, self.waits, self.losses = reach, 0, 0

    def pause_s(self, endpoint: Endpoint, outcome: Outcome, begun: bool) -> float:
        """How long to wait before the next attempt; raises when there is to be none."""
        now = monotonic()
        move = next_move(outcome, self.waits + 1, self.reach.deadline - now)
        error = to_error(outcome, endpoint.address)
        if move.kind == "elsewhere":
            self.reach.failed(endpoint, outcome, now)
            self.losses += 1
        if begun and move.kind != "give_up":
            raise StreamBroken(f"{error}; the sample ended half-way, discard it")
        if move.kind == "give_up" or self.losses >= MAX_FAILURES:
            raise error
        self.waits += move.kind == "wait"
        return move.wait_s
