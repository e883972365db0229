"""Which tokens one forward pass runs, in which order, and what each of them attends to.

Tokens are packed depth first, so that everything below one place of the trie is contiguous:
then "all descendants see these tokens" is one attention call on a slice.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from services.reward_server.engines.attention import Attention
from services.reward_server.engines.model import DecoderModel
from services.reward_server.engines.trie import Run


class Piece(NamedTuple):
    """Tokens [start, stop) of a run at packed positions from `at` on; earlier ones are held."""

    at: int
    run: Run
    start: int
    stop: int
    keep: bool  # its KV goes into the run's buffer; False: a leaf nobody needs again

    @property
    def end(self) -> int:
        return self.at + self.stop - self.start


class Span(NamedTuple):
    """Packed tokens [start, stop) that all see the first `length` tokens of a run."""

    start: int
    stop: int
    run: Run
    length: int


class Packed(NamedTuple):
    """One forward pass."""

    ids: torch.Tensor
    positions: torch.Tensor  # depth in the trie, never the packed index
    pieces: list[Piece]
    spans: list[Span]
    leaves: list[torch.Tensor]  # packed indices [leaf, token] of pieces not kept, one per length


class Work:
    """Runs to compute, and the places whose final hidden state is wanted."""

    def __init__(self) -> None:
        self.runs: dict[int, Run] = {}
        self.rows: dict[tuple[int, int], int] = {}
        self.held: dict[int, torch.Tensor] = {}  # row -> hidden state kept from earlier
        self.wanted: dict[int, list[tuple[int, int]]] = {}  # id(run) -> (offset, row)

    def compute(self, run: Run, stop: int) -> int:
        """Ask for the first `stop` tokens of a run; return how many that adds."""
        added = max(0, stop - run.planned)
        if added:
            run.planned = stop
            self.runs[id(run)] = run
        return added

    def row(self, run: Run, offset: int) -> int:
        """Ask for the hidden state of a run's token; return its row in the result."""
        row = self.rows.setdefault((id(run), offset), len(self.rows))
        if offset in run.hidden and offset < run.computed:
            self.held[row] = run.hidden[offset]
        elif row not in self.held:
            self.wanted.setdefault(id(run), []).append((offset, row))
        return row

    def tokens(self) -> int:
        return sum(run.planned - run.computed for run in self.runs.values())

    def passes(self, budget: int) -> Iterator[list[Piece]]:
        """Cut the work, depth first, into forward passes of at most `budget` tokens."""
        pieces: list[Piece] = []
        at = 0
        for run, keep in depth_first(self.runs.values()):
            start = run.computed
            while start < run.planned:
                room = max(budget - at, 0)
                # A leaf has no buffer to continue from: it is never cut.
                if at and (room == 0 or (not keep and run.planned - start > room)):
                    yield pieces
                    pieces, at = [], 0
                    continue
                stop = min(run.planned, start + room) if keep else run.planned
                pieces.append(Piece(at, run, start, stop, keep))
                at += stop - start
                start = stop
        if pieces:
            yield pieces


def depth_first(runs: Iterable[Run]) -> Iterator[tuple[Run, bool]]:
    """The runs, parents first and siblings by place, each with whether its KV is needed again."""
    wanted = {id(run) for run in runs}
    below: dict[int, dict[int, Run]] = {}  # the part of the trie on the way to a wanted run
    stack: list[Run] = []
    for run in runs:
        for step in run.path():
            if step.parent is None:
                stack = [step]
            elif id(step) in below.setdefault(id(step.parent), {}):
                break
            else:
                below[id(step.parent)][id(step)] = step
    while stack:
        run = stack.pop()
        children = below.get(id(run), {}).values()
        stack.extend(sorted(children, key=lambda child: child.attach, reverse=True))
        if id(run) in wanted:
            yield run, bool(children) or not run.transient


def pack(pieces: list[Piece], device: torch.device) -> Packed:
    """Lay out one forward pass."""
    spans: dict[tuple[int, int, bool], Span] = {}

    def sees(run: Run, length: int, piece: Piece, own: bool) -> None:
        key = (id(run), length, own)
        start = spans[key].start if key in spans else piece.at
        spans[key] = Span(start, piece.end, run, length)

    leaves: dict[int, list[int]] = {}
    for piece in pieces:
        if piece.start:
            sees(piece.run, piece.start, piece, own=True)
        for run in piece.run.path():
            if run.parent is not None and run.attach:
                sees(run.parent, run.attach, piece, own=False)
        if not piece.keep:
            leaves.setdefault(piece.stop - piece.start, []).append(piece.at)
    ids = np.concatenate([piece.run.ids[piece.start : piece.stop] for piece in pieces])
    depths = [np.arange(p.start, p.stop) + p.run.depth for p in pieces]
    return Packed(
        torch.from_numpy(ids.astype(np.int64)).to(device),
        torch.from_numpy(np.concatenate(depths)).to(device),
        pieces,
        list(spans.values()),
        [
            (torch.tensor(at)[:, None] + torch.arange(length)).to(device)
            for length, at in leaves.items()
        ],
    )


def run_work(model: DecoderModel, attention: Attention, work: Work, budget: int) -> torch.Tensor:
    """Compute everything asked for; return the final hidden state of every row."""
    hidden_RD = model.empty_hidden(len(work.rows))
    for row, state in work.held.items():
        hidden_RD[row] = state
    for pieces in work.passes(budget):
        packed = pack(pieces, model.device)
        for piece in pieces:
            if piece.keep:
                piece.run.reserve(piece.run.planned, model.kv_shape)
        states_ND = model.forward(packed.ids, packed.positions, attention(packed))
        wanted = [
            (piece.at + offset - piece.start, row, piece.run, offset)
            for piece in pieces
            for offset, row in work.wanted.get(id(piece.run), ())
            if piece.start <= offset < piece.stop
        ]
        if wanted:
            rows = torch.tensor([row for _, row, _, _ in wanted], device=model.device)
            at = torch.tensor([at for at, _, _, _ in wanted], device=model.device)
            hidden_RD[rows] = model.final_norm(states_ND[at])
        for piece in pieces:
            piece.run.computed = piece.stop
        for _, row, run, offset in wanted:
            if not run.transient:
                run.hidden[offset] = hidden_RD[row].clone()
    return hidden_RD
