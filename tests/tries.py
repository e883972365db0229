"""Small tries for tests: grown by hand or by hypothesis, and spelled out token by token."""

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st

from services.reward_server.engines.packing import Piece, Work
from services.reward_server.engines.trie import Place, Run, Segment, Trie, place_after

Spelled = tuple[int, ...]  # a token and all before it


def walk(trie: Trie, *ids: int) -> list[Segment]:
    return trie.walk((trie.root, 0), np.array(ids, np.int32))


def hold(trie: Trie, like: torch.Tensor, *ids: int) -> Run:
    """Walk and pretend that everything on the path was computed; return the last run."""
    path = walk(trie, *ids)
    for run, _, stop in path:
        run.reserve(len(run.ids), like).zero_()
        run.computed = run.planned = max(run.computed, stop)
    return path[-1][0]


def spell(run: Run) -> Spelled:
    """All tokens from the root to the end of a run."""
    above: Spelled = spell(run.parent)[: run.depth] if run.parent else ()
    return above + tuple(run.ids.tolist())


def every_prefix(sequences: Sequence[Sequence[int]]) -> set[Spelled]:
    return {tuple(ids[:n]) for ids in sequences for n in range(1, len(ids) + 1)}


def spell_tokens(pieces: Sequence[Piece]) -> list[Spelled]:
    """The packed tokens of a pass, each with all before it in the trie."""
    return [
        spell(piece.run)[: piece.run.depth + offset + 1]
        for piece in pieces
        for offset in range(piece.start, piece.stop)
    ]


def plan(work: Work, path: Sequence[Segment]) -> None:
    for run, _, stop in path:
        work.compute(run, stop)


def plan_answer(trie: Trie, work: Work, place: Place, *ids: int) -> list[Segment]:
    path = trie.walk(place, np.array(ids, np.int32), transient=True)
    plan(work, path)
    return path


token_ids = st.lists(st.integers(0, 2), min_size=1, max_size=8)


@st.composite
def planned_tries(draw: st.DrawFn, like: torch.Tensor) -> tuple[Trie, Work]:
    """Some contexts held from earlier calls, new ones, answers after their prefixes, repeats."""
    trie, work = Trie(0), Work()
    for ids in draw(st.lists(token_ids, max_size=2)):
        hold(trie, like, *ids)
    contexts = draw(st.lists(token_ids, min_size=1, max_size=4))
    paths = [walk(trie, *ids) for ids in contexts]
    for path in paths:
        plan(work, path)
    for ids, path in zip(contexts, paths, strict=True):
        for answer_ids in draw(st.lists(token_ids, max_size=2)):
            place = place_after(path, draw(st.integers(1, len(ids))))
            plan_answer(trie, work, place, *answer_ids)
    for run in [run for run in trie.runs() if run.computed]:
        if draw(st.booleans()):
            work.compute(trie.repeat(run, draw(st.integers(0, run.computed - 1))), 1)
    return trie, work
