"""Scoring sessions: one rollout, scored while it unfolds, by the plain or the asyncio client."""

import asyncio
from collections.abc import Sequence
from queue import SimpleQueue
from threading import Timer
from time import monotonic
from typing import Any, NamedTuple

import grpc

from turnwise.client_channels import forks
from turnwise.endpoints import (
    Endpoint,
    Outcome,
    next_move,
    to_error,
    to_outcome,
)
from turnwise.errors import (
    RewardError,
    StreamBroken,
)
from turnwise.score_result import Ids, RolloutScore, from_ids, read_score
from turnwise.v1 import reward_pb2 as pb


class SessionScore(NamedTuple):
    """The reply to a step of a session: its prefixes from `first_prefix` on, with their gains."""

    score: RolloutScore
    first_prefix: int
    provisional: bool  # true until close: a new policy version may still replace these scores


SESSION_ENDED = Outcome(grpc.StatusCode.UNAVAILABLE, "the server ended the session")


class Steps:
    """A session's steps as messages, its replies as scores, and its end: for both clients."""

    def __init__(self, endpoint: Endpoint, deadline_s: float) -> None:
        self.endpoint, self.deadline_s = endpoint, deadline_s
        self.prefixes = 0
        self.ended = False
        self.outcome = Outcome(grpc.StatusCode.OK)  # how it broke

    def extend(self, token_ids: Ids) -> pb.ScoreSessionRequest:
        return pb.ScoreSessionRequest(
            extend=pb.SessionExtend(token_ids=[int(i) for i in token_ids])
        )

    def read(self, reply: pb.ScoreSessionResponse, closing: bool) -> SessionScore:
        self.prefixes += not closing and reply.score.status == pb.ROLLOUT_STATUS_OK
        first = reply.first_prefix
        score = read_score(reply.score, self.prefixes - first, first)
        return SessionScore(score, reply.first_prefix, reply.provisional)

    def check_open(self) -> None:
        forks.check(aio=False)
        if self.ended:
            raise StreamBroken(f"{self.endpoint.address}: the session has ended; open a new one")

    def broken(self, outcome: Outcome) -> RewardError:
        """End the session: the server may have lost it, so it is never continued elsewhere."""
        self.ended, self.outcome = True, outcome
        error = to_error(outcome, self.endpoint.address)
        if next_move(outcome, 1, 0.0).kind == "elsewhere":
            self.endpoint.failed(monotonic())
            return StreamBroken(f"{error}; the session is lost, open a new one")
        return error

    def late(self, timeout_s: float) -> RewardError:
        problem = f"no reply to a step of the session within {timeout_s:.3g} s"
        return self.broken(Outcome(grpc.StatusCode.DEADLINE_EXCEEDED, problem))


def session_open(
    prompt_ids: Ids,
    answers: Sequence[pb.Answer | Ids],
    rollout_id: str = "",
    group_id: str = "",
    options: pb.ScoreOptions | None = None,
) -> pb.SessionOpen:
    """The first step of a session."""
    rollout = from_ids(prompt_ids, [], answers, rollout_id=rollout_id, group_id=group_id)
    return pb.SessionOpen(
        rollout_id=rollout_id,
        group_id=group_id,
        token_ids=rollout.token_ids,
        answers=rollout.answers,
        options=options,
    )


class RewardSession:
    """One rollout, scored while it unfolds."""

    opened: SessionScore  # prefix 0: the prompt

    def __init__(self, stub: Any, steps: Steps, metadata: tuple[tuple[str, str], ...]) -> None:
        self._steps = steps
        self._requests: SimpleQueue[pb.ScoreSessionRequest | None] = SimpleQueue()
        self._call = stub.ScoreSession(iter(self._requests.get, None), metadata=metadata)

    def open(self, first: pb.SessionOpen, timeout_s: float) -> None:
        self.opened = self._step(pb.ScoreSessionRequest(open=first), timeout_s)

    def extend(self, token_ids: Ids) -> SessionScore:
        """Append one turn and score the prefix that it ends."""
        return self._step(self._steps.extend(token_ids), self._steps.deadline_s)

    def close(self) -> RolloutScore:
        """Every prefix, scored by one version."""
        request = pb.ScoreSessionRequest(close=pb.SessionClose())
        reply = self._step(request, self._steps.deadline_s, closing=True)
        self._steps.ended = True
        return reply.score

    def _step(
        self, request: pb.ScoreSessionRequest, timeout_s: float, closing: bool = False
    ) -> SessionScore:
        self._steps.check_open()
        alarm = Timer(timeout_s, self._call.cancel)  # a read has no deadline of its own
        alarm.daemon = True
        end = monotonic() + timeout_s
        alarm.start()
        try:
            self._requests.put(request)
            return self._steps.read(next(self._call), closing)
        except StopIteration:
            raise self._steps.broken(SESSION_ENDED) from None
        except grpc.RpcError as error:
            if monotonic() >= end:
                raise self._steps.late(timeout_s) from None
            raise self._steps.broken(to_outcome(error)) from error
        finally:
            alarm.cancel()

    def drop(self) -> None:
        """Free what the session holds; idempotent."""
        self._steps.ended = True
        self._requests.put(None)  # ends gRPC's thread that waits for the next step
        self._call.cancel()


class AsyncRewardSession:
    """One rollout, scored while it unfolds."""

    opened: SessionScore  # prefix 0: the prompt

    def __init__(self, stub: Any, steps: Steps, metadata: tuple[tuple[str, str], ...]) -> None:
        self._steps = steps
        self._call = stub.ScoreSession(metadata=metadata)

    async def open(self, first: pb.SessionOpen, timeout_s: float) -> None:
        self.opened = await self._step(pb.ScoreSessionRequest(open=first), timeout_s)

    async def extend(self, token_ids: Ids) -> SessionScore:
        """Append one turn and score the prefix that it ends."""
        return await self._step(self._steps.extend(token_ids), self._steps.deadline_s)

    async def close(self) -> RolloutScore:
        """Every prefix, scored by one version."""
        request = pb.ScoreSessionRequest(close=pb.SessionClose())
        reply = await self._step(request, self._steps.deadline_s, closing=True)
        self._steps.ended = True
        return reply.score

    async def _step(
        self, request: pb.ScoreSessionRequest, timeout_s: float, closing: bool = False
    ) -> SessionScore:
        self._steps.check_open()
        try:
            async with asyncio.timeout(timeout_s):
                await self._call.write(request)
                reply = await self._call.read()
        except TimeoutError:
            raise self._steps.late(timeout_s) from None
        except grpc.RpcError as error:
            raise self._steps.broken(to_outcome(error)) from error
        except asyncio.InvalidStateError:  # the stream ended before this step
            raise self._steps.broken(SESSION_ENDED) from None
        if reply is grpc.aio.EOF:
            raise self._steps.broken(SESSION_ENDED)
        return self._steps.read(reply, closing)

    def drop(self) -> None:
        """Free what the session holds; idempotent."""
        self._steps.ended = True
        self._call.cancel()
