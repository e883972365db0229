"""Count the model input positions of a scoring call by walking its trie of token ids.

The sequence of one prefix and one answer is the prefix and the answer up to, not with, its
last scored token: that token is predicted, never an input.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from services.reward_server.engines import ScoreJob, Usage

Ids = npt.NDArray[np.int64]


class Run(msgspec.Struct, frozen=True):
    """A sequence an engine really ran: its first `cached` positions were there, the rest not."""

    job: int
    prefix: int
    answer: int
    cached: int


def count_tokens(jobs: Sequence[ScoreJob], runs: Sequence[Run] = ()) -> list[Usage]:
    """Return one Usage per job; a position that several jobs share is the first job's.

    tokens_computed is what the runs computed, counted at the job that made them and as often
    as it happened; tokens_cached is the positions that runs needed and none of them computed:
    those were there before the call. So tokens_cached + tokens_computed is what the call
    needed after sharing: tokens_unique, plus the positions that were computed again.
    """
    if not jobs:
        return []
    trie = _Edge(None, np.empty(0, np.int64), 0)
    total, unique, cached, computed = ([0] * len(jobs) for _ in range(4))
    leaves: dict[tuple[int, int, int], _Edge] = {}
    for j, job in enumerate(jobs):
        for (k, a), leaf in _insert_job(trie, job, j).items():
            leaves[j, k, a] = leaf
            total[j] += leaf.end
    for run in runs:
        leaf = leaves[run.job, run.prefix, run.answer]
        leaf.cached = run.cached if leaf.cached is None else min(leaf.cached, run.cached)
        computed[run.job] += leaf.end - run.cached
    edges = _edges(trie)
    for edge in reversed(edges):  # children first: who passes a child, passes its parent
        unique[edge.job] += edge.ids.size
        if edge.cached is None:
            continue
        cached[edge.job] += max(0, min(edge.end, edge.cached) - edge.start)
        if edge.parent is not None:
            above = edge.parent.cached
            edge.parent.cached = edge.cached if above is None else min(above, edge.cached)
    return [Usage(*counts) for counts in zip(total, unique, cached, computed, strict=True)]


class _Edge:
    """Positions start..end that all sequences passing here share; the trie grows by splits."""

    __slots__ = ("below", "cached", "ids", "job", "parent", "start")

    def __init__(self, parent: "_Edge | None", ids: Ids, job: int) -> None:
        self.parent = parent
        self.ids = ids
        self.job = job  # the first that came here
        self.start = parent.end if parent else 0
        self.below: dict[int, _Edge] = {}
        self.cached: int | None = None  # the least that any run passing here found cached
        if parent and ids.size:
            parent.below[int(ids[0])] = self

    @property
    def end(self) -> int:
        return self.start + self.ids.size

    def split(self, length: int) -> "_Edge":
        """Cut off and return the head; self stays the tail, so that leaves stay leaves."""
        head = _Edge(self.parent, self.ids[:length], self.job)
        self.parent, self.ids, self.start = head, self.ids[length:], head.end
        head.below[int(self.ids[0])] = self
        return head


def _insert_job(trie: _Edge, job: ScoreJob, number: int) -> dict[tuple[int, int], _Edge]:
    """Insert every prefix once, its answers below it; return where each sequence ends."""
    leaves = {}
    token_ids = np.asarray(job.token_ids, np.int64)
    answers = [np.asarray(a.token_ids[: a.scored_end - 1], np.int64) for a in job.answers]
    edge, start = trie, 0
    for k, end in enumerate(job.prefix_ends):
        edge = _insert(edge, token_ids[start:end], number)
        start = end
        for a, answer in enumerate(answers):
            leaves[k, a] = _insert(edge, answer, number)
    return leaves


def _insert(edge: _Edge, ids: Ids, job: int) -> _Edge:
    while ids.size:
        child = edge.below.get(int(ids[0]))
        if child is None:
            return _Edge(edge, ids, job)
        common = _common_length(child.ids, ids)
        edge = child if common == child.ids.size else child.split(common)
        ids = ids[common:]
    return edge


def _common_length(a: Ids, b: Ids) -> int:
    length = min(a.size, b.size)
    differ = a[:length] != b[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length


def _edges(trie: _Edge) -> list[_Edge]:
    """Return all edges, parents before children."""
    edges = [trie]
    for edge in edges:  # grows while it is walked
        edges.extend(edge.below.values())
    return edges
