"""The trie of runs: where ids branch, what is dropped, and in which order the cache goes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.reward_server.engines.trie import (
    Ids,
    Trie,
    common_length,
    copy_path,
    place_after,
)
from tests.tries import Spelled, every_prefix, hold, spell, walk

EMPTY_KV = torch.zeros((1, 2, 1, 0, 1))  # 8 bytes per token
TOKEN_BYTES = 8


def ids_of(*ids: int) -> Ids:
    return np.array(ids, np.int32)


def held_prefixes(trie: Trie) -> set[Spelled]:
    return every_prefix([spell(run) for run in trie.runs()])


def test_common_length_by_hand() -> None:
    assert common_length(ids_of(1, 2, 3), ids_of(1, 2, 4, 5)) == 2
    assert common_length(ids_of(1, 2), ids_of(1, 2, 3)) == 2
    assert common_length(ids_of(), ids_of(1)) == 0


def test_a_mismatch_starts_a_run_at_that_token_and_splits_nothing() -> None:
    trie = Trie(0)
    ((first, start, stop),) = walk(trie, 1, 2, 3, 4)
    assert (start, stop, first.depth) == (0, 4, 0)

    above, (second, start, stop) = walk(trie, 1, 2, 5)

    assert above == (first, 0, 2)
    assert (second.parent, second.attach, second.depth, start, stop) == (first, 2, 2, 0, 1)
    assert first.ids.tolist() == [1, 2, 3, 4]
    assert first.last_branch == 2


def test_a_longer_sequence_grows_the_run_and_a_shorter_one_adds_nothing() -> None:
    trie = Trie(0)
    first = walk(trie, 1, 2)[0][0]
    longer = walk(trie, 1, 2, 3)
    shorter = walk(trie, 1)

    assert longer == [(first, 0, 2), (first, 2, 3)]
    assert shorter == [(first, 0, 1)]
    assert [run.ids.tolist() for run in trie.runs()] == [[1, 2, 3]]


def test_an_answer_never_grows_the_run_it_hangs_on() -> None:
    trie = Trie(0)
    first = walk(trie, 1, 2)[0][0]
    ((leaf, start, stop),) = trie.walk((first, 2), ids_of(3), transient=True)

    assert (leaf.parent, leaf.attach, start, stop) == (first, 2, 0, 1)
    assert first.ids.tolist() == [1, 2]


def test_a_walk_may_start_anywhere_and_leave_the_way_it_came() -> None:
    trie = Trie(0)
    first = walk(trie, 1, 2, 3)[0][0]

    assert trie.walk((first, 1), ids_of(2, 3)) == [(first, 1, 3)]
    ((leaf, start, stop),) = trie.walk((first, 1), ids_of(9), transient=True)
    assert (leaf.parent, leaf.attach, leaf.depth, leaf.transient) == (first, 1, 1, True)
    assert (start, stop) == (0, 1)


def test_places_along_a_path() -> None:
    trie = Trie(0)
    walk(trie, 1, 2, 3)
    path = walk(trie, 1, 2, 8, 9)
    (first, _, _), (second, _, _) = path

    assert place_after(path, 2) == (first, 2)
    assert place_after(path, 3) == (second, 1)
    with pytest.raises(IndexError, match="1 tokens earlier"):
        place_after(path, 5)


def test_a_repeated_token_stands_beside_the_one_it_repeats() -> None:
    trie = Trie(0)
    first = walk(trie, 1, 2, 3)[0][0]
    second = walk(trie, 1, 2, 7)[-1][0]
    inner, start, root = trie.repeat(first, 1), trie.repeat(second, 0), trie.repeat(first, 0)

    assert [run.ids.tolist() for run in (inner, start, root)] == [[2], [7], [1]]
    assert (inner.parent, inner.attach, inner.depth) == (first, 1, 1)
    assert (start.parent, start.attach, start.depth) == (first, 2, 2)
    assert (root.parent, root.attach, root.depth) == (trie.root, 0, 0)
    assert trie.repeat(first, 1) is inner
    assert walk(trie, 1, 2) == [(first, 0, 2)], "nobody walks into a repeated token"


def test_answers_and_what_was_never_computed_are_dropped() -> None:
    trie = Trie(1000)
    held = hold(trie, EMPTY_KV, 1, 2, 3)
    trie.walk((held, 2), ids_of(8, 9), transient=True)
    planned = walk(trie, 1, 2, 3, 4)[-1][0]
    planned.planned = 1
    half = walk(trie, 5, 6, 7)[0][0]
    half.reserve(3, EMPTY_KV)
    half.computed, half.planned = 2, 3
    trie.drop_transient()

    assert held_prefixes(trie) == every_prefix([(1, 2, 3), (5, 6)])
    assert (half.planned, half.ids.tolist(), held.last_branch) == (2, [5, 6], 0)


def test_the_least_recently_used_tail_goes_first_and_no_more_than_needed() -> None:
    trie = Trie(6 * TOKEN_BYTES)
    hold(trie, EMPTY_KV, 1, 2, 3, 4)
    hold(trie, EMPTY_KV, 1, 2, 5, 6)  # 6 tokens: they fit
    trie.evict()
    assert held_prefixes(trie) == every_prefix([(1, 2, 3, 4), (1, 2, 5, 6)])

    walk(trie, 1, 2, 3)  # 3 4 is now the younger tail
    hold(trie, EMPTY_KV, 7)
    trie.evict()
    assert held_prefixes(trie) == every_prefix([(1, 2, 3, 4), (7,)])
    assert trie.bytes() == 5 * TOKEN_BYTES

    trie.evict(2 * TOKEN_BYTES)
    assert held_prefixes(trie) == {(7,)}


def test_what_others_hang_on_outlives_them_however_old_it_is() -> None:
    trie = Trie(0)
    hold(trie, EMPTY_KV, 1, 2, 3, 4)
    hold(trie, EMPTY_KV, 1, 2, 3, 5)
    hold(trie, EMPTY_KV, 1, 2, 6)
    trie.evict(5 * TOKEN_BYTES)  # 4 is the oldest tail
    assert held_prefixes(trie) == every_prefix([(1, 2, 3, 5), (1, 2, 6)])

    trie.evict(4 * TOKEN_BYTES)  # now 5: 1 2 3 is older, but 5 hangs on it
    assert held_prefixes(trie) == every_prefix([(1, 2, 3), (1, 2, 6)])

    trie.evict(3 * TOKEN_BYTES)
    assert held_prefixes(trie) == every_prefix([(1, 2, 6)])


def test_a_run_that_loses_its_last_branch_is_evicted_once() -> None:
    trie = Trie(0)
    hold(trie, EMPTY_KV, 1, 2, 3, 4)
    hold(trie, EMPTY_KV, 1, 2, 6)
    walk(trie, 1, 2, 3, 4)  # the branch 6 is now older than the tail it hangs before
    hold(trie, EMPTY_KV, 9)
    trie.evict(0)

    assert held_prefixes(trie) == set()
    assert trie.bytes() == 0


def test_kv_goes_along_a_path_into_the_trie_and_back() -> None:
    trie = Trie(1000)
    hold(trie, EMPTY_KV, 1, 2)
    row = torch.arange(10.0).reshape(1, 2, 1, 5, 1)  # keys 0..4, values 5..9 of five tokens
    copy_path(walk(trie, 1, 2, 3, 4, 5), row, into_trie=True)
    held = torch.zeros((1, 2, 1, 5, 1))
    copy_path(walk(trie, 1, 2, 3, 4), held, into_trie=False)

    # 1 2 was held before (as zeros) and stays; the path read back ends after 4.
    assert held.flatten().tolist() == [0, 0, 2, 3, 0, 0, 0, 7, 8, 0]


sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=10), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(sequences)
def test_the_trie_holds_each_distinct_prefix_once(all_ids: list[list[int]]) -> None:
    trie = Trie(0)
    for ids in all_ids:
        path = walk(trie, *ids)
        walked = [int(i) for run, start, stop in path for i in run.ids[start:stop]]
        assert walked == ids

    assert held_prefixes(trie) == every_prefix(all_ids)
    assert sum(len(run.ids) for run in trie.runs()) == len(every_prefix(all_ids))


@settings(max_examples=150, deadline=None)
@given(sequences, st.data())
def test_eviction_takes_unbranched_tails_until_the_rest_fits(
    all_ids: list[list[int]], data: st.DataObject
) -> None:
    trie = Trie(0)
    for ids in all_ids:
        hold(trie, EMPTY_KV, *ids)
    while held := held_prefixes(trie):
        assert trie.bytes() == len(held) * TOKEN_BYTES
        limit = data.draw(st.integers(0, len(held) - 1))
        trie.evict(limit * TOKEN_BYTES)
        kept = held_prefixes(trie)
        assert len(kept) <= limit
        assert kept <= held
        assert all(ids[:-1] in kept for ids in kept if len(ids) > 1)
        if limit == len(held) - 1:  # one tail is enough: its tokens lie one below the other
            gone = sorted(held - kept, key=len)
            assert all(below[: len(ids)] == ids for ids in gone for below in gone[-1:])
            assert [len(ids) for ids in gone] == [*range(len(gone[0]), len(gone[-1]) + 1)]
