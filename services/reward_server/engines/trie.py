"""The trie of token runs: every distinct prefix once, with the KV cache of what was computed.

A run is an unbranched stretch of token ids; other runs branch off it after any number of its
tokens. Runs are never split, so places in them, their KV and their hidden states stay valid
while the trie grows. The pair (run, offset) is the place after the run's first `offset` tokens.
"""

import heapq
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Place = tuple["Run", int]
Segment = tuple["Run", int, int]  # tokens [start, stop) of a run


class Run:
    """One stretch of tokens below `parent`, branching off after `attach` of its tokens."""

    __slots__ = (
        "attach", "call", "children", "computed", "depth", "hidden", "ids", "key", "known", "kv",
        "last_branch", "parent", "planned", "transient", "used",
    )  # fmt: skip

    def __init__(self, parent: "Run | None", attach: int, ids: Ids, transient: bool) -> None:
        self.parent = parent
        self.attach = attach
        self.ids = ids
        self.transient = transient  # an answer: dropped after the call
        self.depth: int = parent.depth + attach if parent else 0  # position of the first token
        self.key = (attach, int(ids[0]) if len(ids) else 0)  # among the parent's children
        self.children: dict[tuple[int, int], Run] = {}
        self.last_branch = 0  # the largest attach of a child; tokens after it are the tail
        self.computed = 0  # tokens whose KV is held
        self.planned = 0  # tokens computed or about to be
        self.kv: torch.Tensor | None = None  # [layer, key|value, head, token, width]
        self.hidden: dict[int, torch.Tensor] = {}  # offset -> final hidden state of its token
        self.used = 0  # when the tail was last needed
        self.call, self.known = 0, 0  # tokens already counted in the call of that number

    def path(self) -> Iterator["Run"]:
        """This run and the runs above it, upwards."""
        run: Run | None = self
        while run is not None:
            yield run
            run = run.parent

    def reserve(self, tokens: int, like: torch.Tensor) -> torch.Tensor:
        """Return the KV buffer, grown to hold `tokens` tokens."""
        held = self.kv
        if held is None or held.shape[3] < tokens:
            self.kv = like.new_empty((*like.shape[:3], tokens, like.shape[4]))
            if held is not None:
                self.kv[:, :, :, : self.computed] = held[:, :, :, : self.computed]
        assert self.kv is not None
        return self.kv


class Trie:
    """All runs of one policy version; holds at most about `limit_bytes` of KV between calls."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.root = Run(None, 0, np.empty(0, np.int32), transient=False)
        self.clock = 0
        self.held_bytes = 0  # KV held, as of the last eviction; safe to read from any thread

    def walk(self, place: Place, ids: Ids, transient: bool = False) -> list[Segment]:
        """Follow `ids` from a place, adding runs where the trie ends; return the path taken."""
        run, offset = place
        self.clock += 1
        path: list[Segment] = []
        while len(ids):
            matched = common_length(run.ids[offset:], ids)
            stop = offset + matched
            if matched:
                path.append((run, offset, stop))
                ids = ids[matched:]
            if len(ids):
                run, offset = self._go_on(run, stop, ids, transient)
        for run, _, stop in path:
            if stop > run.last_branch:
                run.used = self.clock
        return path

    def _go_on(self, run: Run, offset: int, ids: Ids, transient: bool) -> Place:
        """Where ids that the run does not hold at an offset go on: made here if need be."""
        if child := run.children.get((offset, int(ids[0]))):
            return child, 0
        if offset == len(run.ids) and run.parent and not (transient or run.transient):
            # Growing a run turn by turn keeps a session one run, with one call to attend to it.
            run.ids = np.concatenate([run.ids, ids])
            return run, offset
        return attach(Run(run, offset, ids.copy(), transient)), 0

    def repeat(self, run: Run, offset: int) -> Run:
        """A one-token run that computes a token anew whose hidden state was not kept."""
        parent, branch = (run, offset) if offset or not run.parent else (run.parent, run.attach)
        again = Run(parent, branch, run.ids[offset : offset + 1].copy(), transient=True)
        again.key = (branch, ~int(again.ids[0]))  # beside the token it repeats; no id is negative
        return parent.children.get(again.key) or attach(again)

    def runs(self) -> Iterator[Run]:
        """Every run but the root, parents first."""
        stack = [self.root]
        while stack:
            for child in stack.pop().children.values():
                yield child
                stack.append(child)

    def bytes(self) -> int:
        return sum(run.kv.nbytes for run in self.runs() if run.kv is not None)

    def drop_transient(self) -> None:
        """Forget the answers of a call, and whatever was planned but not computed."""
        for run in [*self.runs()]:
            if run.transient or not run.computed:
                remove(run)
            elif run.computed < len(run.ids):
                run.ids = run.ids[: run.computed]
            run.planned = run.computed

    def evict(self, limit_bytes: int | None = None) -> None:
        """Drop the least recently used tails until the KV held fits the limit."""
        limit = self.limit_bytes if limit_bytes is None else limit_bytes
        self.held_bytes = self.bytes()
        excess = self.held_bytes - limit
        if excess <= 0:
            return
        tails = [(run.used, id(run), run) for run in self.runs() if run.last_branch < run.computed]
        heapq.heapify(tails)
        while excess > 0 and tails:
            _, _, run = heapq.heappop(tails)
            if run.last_branch >= run.computed:
                continue  # pushed again after its last branch went, and cut since
            assert run.kv is not None
            excess -= run.kv.nbytes
            parent = run.parent
            trim(run, run.last_branch)
            excess += 0 if run.last_branch == 0 else run.kv.nbytes
            if run.computed == 0 and parent is not None and parent.last_branch < parent.computed:
                heapq.heappush(tails, (parent.used, id(parent), parent))
        self.held_bytes = limit + excess


def attach(run: Run) -> Run:
    """Hang a new run below its parent."""
    assert run.parent is not None
    run.parent.children[run.key] = run
    run.parent.last_branch = max(run.parent.last_branch, run.attach)
    return run


def common_length(left: Ids, right: Ids) -> int:
    """How many leading tokens two id arrays share."""
    size = min(len(left), len(right))
    differs = left[:size] != right[:size]
    return int(differs.argmax()) if differs.any() else size


def trim(run: Run, length: int) -> None:
    """Forget the run's tokens from `length` on; nothing may branch off behind it."""
    if length == 0:
        remove(run)
        return
    run.ids = run.ids[:length].copy()
    run.computed = run.planned = min(run.computed, length)
    run.hidden = {offset: state for offset, state in run.hidden.items() if offset < length}
    if run.kv is not None:
        run.kv = run.kv[:, :, :, :length].clone()


def remove(run: Run) -> None:
    """Take a run, and all below it, out of the trie."""
    parent = run.parent
    if parent is None:
        return
    parent.children.pop(run.key, None)
    parent.last_branch = max((attach for attach, _ in parent.children), default=0)
    run.computed = run.planned = 0
    run.kv = None


def copy_path(path: list[Segment], row: torch.Tensor, into_trie: bool) -> None:
    """Copy the KV of a path from the root to a row [layer, 2, head, token, width], or back."""
    for run, _, stop in path:
        start = run.computed if into_trie else 0
        if start >= stop:
            continue
        there = row[:, :, :, run.depth + start : run.depth + stop]
        if into_trie:
            run.reserve(len(run.ids), row[:, :, :, :0])[:, :, :, start:stop] = there
            run.computed = run.planned = stop
        else:
            assert run.kv is not None
            there.copy_(run.kv[:, :, :, start:stop])


def place_after(path: list[Segment], tokens: int) -> Place:
    """The place after the first `tokens` (at least one) tokens of a path."""
    for run, start, stop in path:
        if tokens <= stop - start:
            return run, start + tokens
        tokens -= stop - start
    raise IndexError(f"the path ends {tokens} tokens earlier")
