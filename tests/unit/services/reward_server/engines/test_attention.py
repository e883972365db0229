"""Attention along the trie: every backend equals a plain softmax over a token's ancestors."""

from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.reward_server.engines.attention import BACKENDS
from services.reward_server.engines.packing import Packed, Work, pack
from services.reward_server.engines.trie import Run, Trie
from tests.tries import Spelled, hold, plan, plan_answer, planned_tries, spell, spell_tokens, walk

pytestmark = pytest.mark.slow  # `make check` stays under a minute without it

WIDTH = 8
CPU = torch.device("cpu")
NAN = float("nan")


def empty_kv(key_heads: int) -> torch.Tensor:
    return torch.zeros((1, 2, key_heads, 0, WIDTH))


class Vectors:
    """A random query, key and value for every token, known by all that is before it."""

    def __init__(self, heads: int, key_heads: int, poison: Spelled | None = None) -> None:
        self.heads, self.key_heads = heads, key_heads
        self.poison = poison  # tokens from here on have NaN keys and values

    @cache  # noqa: B019 (lives as long as its test)
    def of(self, token: Spelled) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        draw = torch.Generator().manual_seed(hash(token) % 2**32)
        shapes = (self.heads, self.key_heads, self.key_heads)
        q, k, v = (torch.randn((heads, WIDTH), generator=draw) for heads in shapes)
        if self.poison and token[: len(self.poison)] == self.poison:
            k, v = torch.full_like(k, NAN), torch.full_like(v, NAN)
        return 3 * q, k, v  # peaked, so that a wrong key shows

    def fill(self, run: Run) -> None:
        """Write the keys and values of a run's held tokens."""
        for offset in range(run.computed):
            assert run.kv is not None
            _, run.kv[0, 0, :, offset], run.kv[0, 1, :, offset] = self.of(
                spell(run)[: run.depth + offset + 1]
            )

    def plain(self, token: Spelled) -> NDArray[np.float64]:
        """Softmax attention of one token over itself and all before it, in numpy."""
        q_HW = self.of(token)[0].double().numpy()
        kv = [self.of(token[:n])[1:] for n in range(1, len(token) + 1)]
        group = self.heads // self.key_heads
        k_HTW, v_HTW = (
            torch.stack([pair[i] for pair in kv], 1).double().numpy().repeat(group, 0)
            for i in (0, 1)
        )
        score_HT = (k_HTW @ q_HW[:, :, None])[:, :, 0] / WIDTH**0.5
        weight_HT = np.exp(score_HT - score_HT.max(-1, keepdims=True))
        weight_HT /= weight_HT.sum(-1, keepdims=True)
        out_HW: NDArray[np.float64] = (weight_HT[:, None] @ v_HTW)[:, 0]
        return out_HW.reshape(-1)


def attended(
    work: Work, budget: int, backends: list[str], vectors: Vectors
) -> Iterator[tuple[list[Spelled], list[torch.Tensor]]]:
    """Run every pass through the backends: the tokens, and each backend's output for them."""
    for pieces in work.passes(budget):
        packed: Packed = pack(pieces, CPU)
        tokens = spell_tokens(pieces)
        q, k, v = (torch.stack(x) for x in zip(*map(vectors.of, tokens), strict=True))
        for piece in pieces:
            if piece.keep:
                piece.run.reserve(piece.run.planned, empty_kv(vectors.key_heads))
        yield tokens, [BACKENDS[name](packed)(0, q, k, v) for name in backends]
        for piece in pieces:
            piece.run.computed = piece.stop


def check_plain(trie: Trie, work: Work, budget: int, backends: list[str], v: Vectors) -> None:
    for run in trie.runs():
        v.fill(run)
    for tokens, outputs in attended(work, budget, backends, v):
        plain = np.stack([v.plain(token) for token in tokens])
        for output in outputs:
            assert np.abs(output.numpy() - plain).max() <= 1e-5


@settings(max_examples=40, deadline=None)
@given(data=st.data(), budget=st.sampled_from([2, 7, 24]))
def test_merged_and_dense_equal_a_plain_softmax_over_the_ancestors(
    data: st.DataObject, budget: int
) -> None:
    heads, key_heads = data.draw(st.sampled_from([(4, 2), (2, 2), (3, 1)]))
    trie, work = data.draw(planned_tries(empty_kv(key_heads)))
    check_plain(trie, work, budget, ["merged", "dense"], Vectors(heads, key_heads))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_equals_a_plain_softmax_on_a_small_trie() -> None:
    check_plain(*two_rollouts(), 100, ["flex"], Vectors(4, 2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=15, deadline=None)
@given(planned=planned_tries(empty_kv(2)), budget=st.sampled_from([9, 24]))
def test_flex_equals_a_plain_softmax_over_the_ancestors(
    planned: tuple[Trie, Work], budget: int
) -> None:
    check_plain(*planned, budget, ["flex"], Vectors(4, 2))


def two_rollouts() -> tuple[Trie, Work]:
    """Prompt 1 2 3 held; rollouts 4 5 (4 held) and 6 7, each with an answer 8 9 at its end."""
    trie, work = Trie(0), Work()
    hold(trie, empty_kv(2), 1, 2, 3, 4)
    for ids in ((1, 2, 3, 4, 5), (1, 2, 3, 6, 7)):
        path = walk(trie, *ids)
        plan(work, path)
        run, _, stop = path[-1]
        plan_answer(trie, work, (run, stop), 8, 9)
    return trie, work


@pytest.mark.parametrize("poison", [(1, 2, 3, 4), (1, 2, 3, 6), (1, 2, 3, 4, 5, 8)])
@pytest.mark.parametrize("budget", [3, 100])
def test_nan_in_one_rollout_never_reaches_another(poison: Spelled, budget: int) -> None:
    outputs: dict[bool, dict[Spelled, torch.Tensor]] = {}
    for poisoned in (False, True):
        trie, work = two_rollouts()
        vectors = Vectors(4, 2, poison if poisoned else None)
        for run in trie.runs():
            vectors.fill(run)
        passes = [*attended(work, budget, ["merged"], vectors)]
        outputs[poisoned] = {
            token: row for tokens, (out,) in passes for token, row in zip(tokens, out, strict=True)
        }

    assert len(outputs[True]) == 7  # 5, 6 7 and twice 8 9
    for token, row in outputs[True].items():
        if token[: len(poison)] == poison:
            assert row.isnan().all()
        else:
            assert torch.equal(row, outputs[False][token]), "bit for bit as without the NaN"
