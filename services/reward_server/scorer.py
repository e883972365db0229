"""The scorer: jobs of many calls share batches, by turns, each call under one policy version.

A call waits in a fair queue until all of its jobs are scored, its deadline passes, or it is
cancelled. Batches hold at most `batch_tokens`, so a huge call is scored in pieces and small
calls pass between them. When new weights were swapped in between two pieces, the earlier pieces
go back into the queue: simpler than holding a swap up for the longest call, and it costs only
the calls that a swap really divides.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

from services.reward_server.call import Call, CallScores, Unscored
from services.reward_server.engines import Engine, EngineUnhealthy, JobScore, ScoreJob, ScoreResult
from services.reward_server.errors import Overloaded
from services.reward_server.fair_queue import FairQueue
from services.reward_server.metrics import ServerMetrics

log = logging.getLogger(__name__)

LEAST_RETRY_S, MOST_RETRY_S = 0.05, 30.0
FIRST_TOKENS_PER_S = 10_000.0  # a guess, until the first batch is measured

Entries = list[tuple[Call, int]]  # a call, and which of its jobs


class Batch:
    """What the engine scores in one call."""

    def __init__(self, entries: Entries) -> None:
        self.entries = entries
        self.task: asyncio.Task[None] | None = None

    def wanted(self) -> bool:
        return any(call.open for call, _ in self.entries)


class Scorer:
    """Micro-batching over one engine; see the head of this file."""

    def __init__(
        self,
        engine: Engine,
        metrics: ServerMetrics,
        *,
        batch_tokens: int,
        batch_window_s: float,
        max_queued_tokens: int,
        running_batches: int = 1,
        on_unhealthy: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.engine, self._metrics = engine, metrics
        self._batch_tokens, self._window_s = batch_tokens, batch_window_s
        self._max_queued_tokens, self._slots = max_queued_tokens, running_batches
        self._on_unhealthy = on_unhealthy
        self._queue: FairQueue[Call] = FairQueue()
        self._batches: set[Batch] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._alone = True  # the last batch was of one call
        self._window_began: float | None = None  # when the queue was last empty, loop time
        self._tokens_per_s = FIRST_TOKENS_PER_S
        self.queued_tokens = 0  # admitted and not yet taken by a batch

    async def score(
        self, jobs: Sequence[ScoreJob], costs: Sequence[int], deadline: float, client: str = ""
    ) -> CallScores:
        """Score all jobs by one version until `deadline` (loop time).

        `costs` are unique tokens. Overloaded when there is no room for the call. A call with
        more tokens than the whole queue may hold gets as far as there is room.
        """
        refused = self._admit(costs)
        admitted = [i for i in range(len(jobs)) if i not in refused]
        call = Call([jobs[i] for i in admitted], [costs[i] for i in admitted], deadline, client)
        if admitted:
            await self._until_done(call)
        version = self.engine.policy_version if call.version is None else call.version
        done = iter(call.outcomes())
        scores = tuple(refused[i] if i in refused else next(done) for i in range(len(jobs)))
        return CallScores(scores, version, call.route or self.engine.info().route)

    async def _until_done(self, call: Call) -> None:
        self._enqueue(call)
        try:
            async with asyncio.timeout_at(call.deadline):
                await call.done.wait()
        except TimeoutError:
            pass  # what is not scored by now is DEADLINE
        finally:
            self._close(call)

    def _admit(self, costs: Sequence[int]) -> dict[int, Unscored]:
        """Return which jobs have no room; Overloaded if the call as a whole has none."""
        room, limit = self._max_queued_tokens - self.queued_tokens, self._max_queued_tokens
        needed = sum(costs)
        if needed <= room:
            return {}
        refused: dict[int, Unscored] = {}
        for i, cost in enumerate(costs):
            if cost > limit:
                reason = f"{cost} tokens exceed the limit max_queued_tokens={limit}"
                refused[i] = Unscored("INVALID", reason)
            elif needed <= limit or cost > room:
                reason = f"the call needs {needed} tokens, max_queued_tokens={limit}; send less"
                refused[i] = Unscored("OVERLOADED", reason)
            else:
                room -= cost
        if any(r.status == "OVERLOADED" for r in refused.values()) and len(refused) == len(costs):
            self._metrics.overloaded.inc()
            retry_s = self._retry_after_s(min(needed, limit))
            full = f"{self.queued_tokens} tokens are queued, max_queued_tokens={limit}"
            raise Overloaded(f"{full}; retry in {retry_s:.2f} s", retry_s)
        return refused

    def _retry_after_s(self, tokens: int) -> float:
        """About when there is room for so many more."""
        surplus = self.queued_tokens + tokens - self._max_queued_tokens
        return min(max(surplus / self._tokens_per_s, LEAST_RETRY_S), MOST_RETRY_S)

    def _enqueue(self, call: Call) -> None:
        self._queue.add(call)
        self._queue_tokens(call.waiting_tokens())
        if self._window_began is None:
            self._window_began = asyncio.get_running_loop().time()
        self._pump()

    def _queue_tokens(self, tokens: int) -> None:
        self.queued_tokens += tokens
        self._metrics.queued_tokens.inc(tokens)

    def _close(self, call: Call) -> None:
        """Nobody waits for the call any more: free what is queued, stop what runs for it alone."""
        self._queue_tokens(-call.waiting_tokens())
        call.close()
        for batch in [*self._batches]:
            if batch.task is not None and not batch.wanted():
                batch.task.cancel()

    def _pump(self) -> None:
        """Start batches while there is work and a slot for it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self.queued_tokens and len(self._batches) < self._slots:
            if (delay_s := self._window_left()) > 0:
                self._timer = asyncio.get_running_loop().call_later(delay_s, self._pump)
                return
            batch = Batch(self._take())
            if not batch.entries:  # all had waited past their deadlines
                return
            self._alone = len({id(call) for call, _ in batch.entries}) == 1
            self._batches.add(batch)
            batch.task = asyncio.create_task(self._run(batch))

    def _window_left(self) -> float:
        """How long to wait for company; a full batch, or one that waited long enough, goes.

        Nobody waits while calls come one by one: only where the last batch had company.
        """
        if self._alone or self._window_began is None or self.queued_tokens >= self._batch_tokens:
            return 0.0
        return self._window_began + self._window_s - asyncio.get_running_loop().time()

    def _take(self) -> Entries:
        """Take the next jobs by turns, as many as fit; one larger than a batch goes alone."""
        entries: Entries = []
        room, now = self._batch_tokens, asyncio.get_running_loop().time()
        while (call := self._queue.pop()) is not None:
            served = 0
            if call.deadline <= now:
                self._queue_tokens(-call.waiting_tokens())
                call.waiting.clear()
            elif entries and call.costs[call.waiting[0]] > room:
                self._queue.served(call, 0)
                return entries
            else:
                i = call.waiting.popleft()
                entries.append((call, i))
                served = call.costs[i]
                room -= served
                self._queue_tokens(-served)
                if i == 0:
                    self._metrics.seconds.labels("queue").observe(now - call.began)
            self._queue.served(call, served)
        self._window_began = None
        return entries

    async def _run(self, batch: Batch) -> None:
        try:
            await self._score(batch.entries)
        finally:
            self._batches.discard(batch)
            self._pump()

    async def _score(self, entries: Entries) -> None:
        """Have the engine score a batch; should it fail as a whole, each call of it alone."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            result = await self.engine.score([call.jobs[i] for call, i in entries])
            scored = list(zip(entries, result.jobs, strict=True))
        except EngineUnhealthy as error:
            _fail(entries, f"the engine is unhealthy: {error}")
            self._on_unhealthy(str(error))
        except Exception as error:  # an engine should fail job by job, but who knows
            log.exception("engine call failed", extra={"rollouts": len(entries)})
            parts = _by_call(entries)
            if len(parts) == 1:
                _fail(entries, f"the engine failed: {error}")
            else:
                for part in parts:
                    await self._score(part)
        else:
            self._measure(entries, result, loop.time() - began)
            for (call, i), score in scored:
                self._accept(call, i, score, result)

    def _measure(self, entries: Entries, result: ScoreResult, seconds: float) -> None:
        tokens = sum(call.costs[i] for call, i in entries)
        self._metrics.count_batch(len(entries), tokens, seconds, result.usage)
        self._tokens_per_s += 0.2 * (tokens / max(seconds, 1e-6) - self._tokens_per_s)

    def _accept(self, call: Call, i: int, score: JobScore, result: ScoreResult) -> None:
        if not call.open:
            return
        in_queue = call.has_work()
        if again := call.accept(i, score, result.policy_version, result.route):
            log.info("version changed within a call", extra={"rollouts": len(again)})
            self._queue_tokens(sum(call.costs[i] for i in again))
            if not in_queue:
                self._queue.add(call)


def _fail(entries: Entries, reason: str) -> None:
    for call, i in entries:
        call.fail(i, reason)


def _by_call(entries: Entries) -> list[Entries]:
    parts: dict[Call, Entries] = {}
    for call, i in entries:
        parts.setdefault(call, []).append((call, i))
    return list(parts.values())
