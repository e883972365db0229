"""One call in the scorer: its jobs, how far each of them is, and the version they share."""

import asyncio
from collections import deque
from collections.abc import Sequence

import msgspec

from services.reward_server.engines import JobScore, ScoreJob
from services.reward_server.requests import Status


class Unscored(msgspec.Struct, frozen=True):
    """Why a job has no scores, where the engine did not say."""

    status: Status
    reason: str


class CallScores(msgspec.Struct, frozen=True):
    """One entry per job, in order; all that is OK is by one version over one route."""

    jobs: tuple[JobScore | Unscored, ...]
    policy_version: int
    route: str


class Call:
    """Jobs go from `waiting` through a batch to `scores`, and back when their version is old."""

    def __init__(
        self, jobs: Sequence[ScoreJob], costs: Sequence[int], deadline: float, client: str
    ) -> None:
        self.jobs = jobs
        self.costs = [max(1, cost) for cost in costs]  # nobody waits for nothing
        self.began = asyncio.get_running_loop().time()
        self.deadline = deadline  # loop time
        self.client = client
        self.waiting = deque(range(len(jobs)))
        self.scores: dict[int, JobScore | Unscored] = {}
        self.version: int | None = None  # of what is in scores
        self.route = ""
        self.open = True
        self.done = asyncio.Event()

    def has_work(self) -> bool:
        return bool(self.waiting)

    def waiting_tokens(self) -> int:
        return sum(self.costs[i] for i in self.waiting)

    def accept(self, i: int, score: JobScore, version: int, route: str) -> list[int]:
        """Keep a score of the newest version; return the jobs that have to be scored again."""
        again: list[int] = []
        if self.version is not None and version < self.version:
            again = [i]  # a batch that was under way while newer weights came
        else:
            if self.version is not None and version > self.version:
                again = sorted(self.scores)
                self.scores.clear()
            self.version, self.route = version, route
            self._keep(i, score)
        self.waiting.extendleft(reversed(again))
        return again

    def fail(self, i: int, reason: str) -> None:
        self._keep(i, Unscored("ERROR", reason))

    def _keep(self, i: int, score: JobScore | Unscored) -> None:
        self.scores[i] = score
        if len(self.scores) == len(self.jobs):
            self.done.set()

    def close(self) -> None:
        self.open = False
        self.waiting.clear()

    def outcomes(self) -> list[JobScore | Unscored]:
        late = Unscored("DEADLINE", "the deadline passed before it was scored")
        return [self.scores.get(i, late) for i in range(len(self.jobs))]
