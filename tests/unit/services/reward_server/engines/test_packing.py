"""Forward passes: which tokens, in which order, and what each of them may see."""

from collections import Counter
from collections.abc import Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.reward_server.engines.attention import key_table
from services.reward_server.engines.packing import Packed, Piece, Span, Work, pack
from services.reward_server.engines.trie import Trie
from tests.tries import (
    Spelled,
    hold,
    plan,
    plan_answer,
    planned_tries,
    spell,
    spell_tokens,
    walk,
)

CPU = torch.device("cpu")
EMPTY_KV = torch.zeros((1, 2, 1, 0, 1))


def all_passes(work: Work, budget: int) -> list[Packed]:
    """Pack every pass and pretend that it was computed."""
    done = []
    for pieces in work.passes(budget):
        done.append(pack(pieces, CPU))
        for piece in pieces:
            piece.run.computed = piece.stop
    return done


def small_trie() -> tuple[Trie, Work]:
    """Contexts 1 2 3 4 and 1 2 3 5; answer input 8 after 1 2 and after 1 2 3 5."""
    trie, work = Trie(0), Work()
    first, second = walk(trie, 1, 2, 3, 4), walk(trie, 1, 2, 3, 5)
    plan(work, first)
    plan(work, second)
    plan_answer(trie, work, (first[0][0], 2), 8)
    plan_answer(trie, work, (second[-1][0], 1), 8)
    return trie, work


def test_one_pass_by_hand() -> None:
    _, work = small_trie()
    assert work.tokens() == 7
    (packed,) = all_passes(work, budget=7)
    context, early, turn, late = (piece.run for piece in packed.pieces)

    assert packed.ids.tolist() == [1, 2, 3, 4, 8, 5, 8]
    assert packed.positions.tolist() == [0, 1, 2, 3, 2, 3, 4]
    assert [piece.keep for piece in packed.pieces] == [True, False, True, False]
    assert sorted(packed.spans, key=lambda span: (span.start, -span.stop)) == [
        Span(4, 5, context, 2),  # the early answer sees 1 2
        Span(5, 7, context, 3),  # the turn and its answer see 1 2 3
        Span(6, 7, turn, 1),  # the late answer sees the turn
    ]
    assert [at.tolist() for at in packed.leaves] == [[[4], [6]]]
    assert (early.depth, late.depth) == (2, 4)


def test_a_run_cut_by_the_budget_sees_its_own_beginning() -> None:
    _, work = small_trie()
    first, second, third = all_passes(work, budget=3)
    context, turn = first.pieces[0].run, second.pieces[2].run

    assert [packed.ids.tolist() for packed in (first, second, third)] == [
        [1, 2, 3],
        [4, 8, 5],
        [8],
    ]
    assert first.spans == []
    assert second.spans == [Span(0, 1, context, 3), Span(1, 2, context, 2), Span(2, 3, context, 3)]
    assert {(span.run, span.length) for span in third.spans} == {(context, 3), (turn, 1)}


def test_held_tokens_are_seen_but_not_run_again() -> None:
    trie, work = Trie(0), Work()
    held = hold(trie, EMPTY_KV, 1, 2, 3)
    plan(work, walk(trie, 1, 2, 3, 4))
    (packed,) = all_passes(work, budget=9)

    assert (packed.ids.tolist(), packed.positions.tolist()) == ([4], [3])
    assert packed.spans == [Span(0, 1, held, 3)]


def test_a_row_is_asked_for_once_and_a_kept_state_is_not_computed() -> None:
    trie, work = Trie(0), Work()
    held = hold(trie, EMPTY_KV, 1, 2)
    held.hidden[1] = torch.tensor([7.0])
    new = walk(trie, 1, 2, 3)[-1][0]
    rows = [work.row(held, 1), work.row(new, 0), work.row(held, 1)]

    assert rows == [0, 1, 0]
    assert {row: state.item() for row, state in work.held.items()} == {0: 7.0}
    assert work.wanted == {id(new): [(0, 1)]}


def check_order(passes: Sequence[list[Piece]], budget: int) -> None:
    done: dict[int, int] = {}  # id(run) -> tokens computed in this or an earlier pass
    for pieces in passes:
        size = sum(piece.stop - piece.start for piece in pieces)
        assert size <= budget or len(pieces) == 1, "only a leaf may be larger, on its own"
        for piece in pieces:
            assert piece.start == done.get(id(piece.run), piece.start), "in order, nothing twice"
            assert piece.stop <= len(piece.run.ids)
            parent = piece.run.parent
            if parent is not None and id(parent) in done:
                assert done[id(parent)] >= piece.run.attach, "parents first"
            if not piece.keep:
                assert (piece.start, piece.stop) == (0, piece.run.planned), "a leaf is not cut"
            done[id(piece.run)] = piece.stop


@settings(max_examples=200, deadline=None)
@given(planned=planned_tries(EMPTY_KV), budget=st.integers(1, 12))
def test_every_planned_token_runs_once_within_the_budget(
    planned: tuple[Trie, Work], budget: int
) -> None:
    trie, work = planned
    wanted = Counter(
        (id(run), offset) for run in trie.runs() for offset in range(run.computed, run.planned)
    )
    assert work.tokens() == wanted.total()
    passes = [packed.pieces for packed in all_passes(work, budget)]

    check_order(passes, budget)
    assert wanted == Counter(
        (id(piece.run), offset)
        for pieces in passes
        for piece in pieces
        for offset in range(piece.start, piece.stop)
    )
    assert work.tokens() == 0


def seen_by_table(packed: Packed) -> list[list[Spelled]]:
    """Per packed token the keys that the mask lets it see."""
    table = key_table(packed)
    leaves = [piece.run for piece in packed.pieces if not piece.keep]
    runs = [*(run for run, _ in table.runs), *leaves]
    tokens, keys = torch.arange(len(packed.ids)), torch.arange(len(table.key_run_M))
    visible = table.visible(tokens[:, None], keys[None]).tolist()
    places = [*zip(table.key_run_M.tolist(), table.key_place_M.tolist(), strict=True)]
    spelled = [spell(runs[run])[: runs[run].depth + place + 1] for run, place in places]
    return [[key for key, sees in zip(spelled, row, strict=True) if sees] for row in visible]


def seen_by_spans(packed: Packed) -> list[list[Spelled]]:
    """Per packed token what a causal call on its own piece and the spans let it see."""
    seen: list[list[Spelled]] = []
    for piece in packed.pieces:
        own = spell_tokens([piece])
        seen += [own[: i + 1] for i in range(len(own))]
    for span in packed.spans:
        whole = spell(span.run)
        keys = [whole[: span.run.depth + i + 1] for i in range(span.length)]
        for row in range(span.start, span.stop):
            seen[row] = seen[row] + keys
    return seen


@settings(max_examples=80, deadline=None)
@given(planned=planned_tries(EMPTY_KV), budget=st.integers(1, 12))
def test_a_token_sees_itself_and_what_comes_before_it_each_once(
    planned: tuple[Trie, Work], budget: int
) -> None:
    for pieces in planned[1].passes(budget):
        packed = pack(pieces, CPU)
        tokens = spell_tokens(pieces)
        ancestry = [[token[:n] for n in range(1, len(token) + 1)] for token in tokens]

        assert [sorted(seen, key=len) for seen in seen_by_table(packed)] == ancestry
        assert [sorted(seen, key=len) for seen in seen_by_spans(packed)] == ancestry
        assert packed.positions.tolist() == [len(token) - 1 for token in tokens]
        assert packed.ids.tolist() == [token[-1] for token in tokens]
        for piece in pieces:
            piece.run.computed = piece.stop
