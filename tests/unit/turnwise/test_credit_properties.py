"""Credit assignment: facts that hold for every input, and a slow independent implementation."""

from collections.abc import Iterable
from itertools import chain, pairwise
from math import exp, sqrt
from random import Random
from statistics import fmean, pstdev
from typing import get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.credit import (
    Credit,
    CreditOptions,
    Norm,
    advantage_bound,
    credit,
)
from turnwise.credit_batch import to_batch
from turnwise.scores import GainKind, turn_gains

Rollout = tuple[list[float | None], float | None]  # scores (or gains), outcome
Group = list[Rollout]

# Multiples of 1/64: sums are exact, and no pool spreads about as much as the threshold of ties.
STEPS = st.integers(-640, 0).map(lambda step: step / 64)
SCORES = st.lists(st.none() | STEPS | STEPS | STEPS, min_size=1, max_size=5)
OUTCOMES = st.sampled_from([None, -1.0, 0.0, 0.0, 0.25, 0.5, 1.0, 1.0])
GROUPS = st.lists(st.tuples(SCORES, OUTCOMES), min_size=1, max_size=5)
BATCHES = st.lists(GROUPS, min_size=1, max_size=3)
VALID_GROUPS = st.lists(
    st.tuples(st.lists(STEPS, min_size=1, max_size=5), OUTCOMES), min_size=1, max_size=5
)
WEIGHTS = st.sampled_from([0.0, 0.5, 1.0, 3.0])
OPTIONS = st.builds(
    CreditOptions,
    gain=st.sampled_from(get_args(GainKind)),
    norm=st.sampled_from(get_args(Norm)),
    gamma=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    outcome_weight=WEIGHTS,
    gain_weight=WEIGHTS,
)


def to_credit(groups: list[Group], options: CreditOptions, given_gains: bool = False) -> Credit:
    rollouts = list(chain.from_iterable(groups))
    values, outcomes = [values for values, _ in rollouts], [outcome for _, outcome in rollouts]
    sizes = [len(group) for group in groups]
    return credit(to_batch(values, outcomes, sizes, "gains" if given_gains else "scores"), options)


def by_rollout(group: Group, result: Credit) -> list[list[float]]:
    ends = np.cumsum([len(scores) for scores, _ in group])[:-1]
    return [part.tolist() for part in np.split(result.advantages, ends)]


@settings(deadline=None)
@given(BATCHES, OPTIONS)
def test_it_agrees_with_the_definition_written_as_loops(
    groups: list[Group], options: CreditOptions
) -> None:
    result = to_credit(groups, options)

    slow = [slow_group(group, options) for group in groups]
    advantages = chain.from_iterable(chain.from_iterable(group for group, _ in slow))
    mask = chain.from_iterable(chain.from_iterable(group for _, group in slow))
    assert result.advantages.tolist() == pytest.approx(list(advantages), rel=1e-9, abs=1e-9)
    assert result.mask.tolist() == list(mask)


@settings(deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=9), st.sampled_from(get_args(GainKind)))
def test_gains_telescope(scores: list[float], kind: GainKind) -> None:
    first, last = (exp(s) if kind == "prob" else s for s in (scores[0], scores[-1]))

    gains = turn_gains(scores, kind)
    assert sum(gain for gain in gains if gain is not None) == pytest.approx(last - first)
    result = to_credit([[(list(scores), 1.0)]], CreditOptions(gain=kind))
    assert result.gains.sum() == pytest.approx(last - first)


@settings(deadline=None)
@given(GROUPS, OPTIONS, st.randoms())
def test_permuting_rollouts_permutes_results(
    group: Group, options: CreditOptions, random: Random
) -> None:
    order = list(range(len(group)))
    random.shuffle(order)
    permuted = [group[index] for index in order]

    before = by_rollout(group, to_credit([group], options))
    after = by_rollout(permuted, to_credit([permuted], options))

    for index, advantages in zip(order, after, strict=True):
        assert advantages == pytest.approx(before[index], rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(GROUPS, st.integers(-1000, 1000))
def test_a_constant_on_all_outcomes_changes_nothing_under_separate(
    group: Group, constant: int
) -> None:
    moved = [(scores, None if o is None else o + constant) for scores, o in group]

    before = to_credit([group], CreditOptions()).advantages.tolist()
    after = to_credit([moved], CreditOptions()).advantages.tolist()

    assert after == pytest.approx(before, rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(GROUPS, st.floats(-1e6, 1e6))
def test_equal_outcomes_get_zeros_while_the_gains_still_teach(group: Group, same: float) -> None:
    tied: Group = [(scores, same) for scores, _ in group]

    result = to_credit([tied], CreditOptions())

    last = np.cumsum([len(scores) for scores, _ in tied]) - 1
    assert not result.advantages[last].any()
    counted = result.gains[result.gain_valid]
    assert result.zero_signal.tolist() == [len(set(counted.tolist())) < 2]


@settings(deadline=None)
@given(BATCHES, OPTIONS, st.floats(allow_nan=True, allow_infinity=True))
def test_a_masked_number_is_never_looked_at(
    groups: list[Group], options: CreditOptions, garbage: float
) -> None:
    rollouts = list(chain.from_iterable(groups))
    values, outcomes = [scores for scores, _ in rollouts], [outcome for _, outcome in rollouts]
    clean = to_batch(values, outcomes, [len(group) for group in groups])
    dirty = msgspec.structs.replace(
        clean,
        values=np.where(clean.valid, clean.values, garbage),
        outcomes=np.where(clean.outcome_valid, clean.outcomes, garbage),
    )

    assert credit(dirty, options).advantages.tolist() == credit(clean, options).advantages.tolist()


@settings(deadline=None)
@given(GROUPS, SCORES, OPTIONS)
def test_a_rollout_without_outcome_influences_nobody(
    group: Group, scores: list[float | None], options: CreditOptions
) -> None:
    result = to_credit([[*group, (scores, None)]], options)
    alone = to_credit([group], options)

    turns = len(alone.advantages)
    assert result.advantages[:turns].tolist() == alone.advantages.tolist()
    assert not result.advantages[turns:].any()
    assert not result.mask[turns:].any()
    assert result.zero_signal.tolist() == alone.zero_signal.tolist()


@settings(deadline=None)
@given(GROUPS, OPTIONS.filter(lambda options: options.norm != "per_turn_index"))
def test_a_turn_without_gain_is_to_the_others_as_if_it_were_not_there(
    group: Group, options: CreditOptions
) -> None:
    options = msgspec.structs.replace(options, gamma=1.0)  # below 1 the distance counts
    without: Group = [([gain for gain in gains if gain is not None], o) for gains, o in group]

    result = to_credit([group], options, given_gains=True)
    shorter = to_credit([without], options, given_gains=True)

    there = result.gain_valid.copy()
    there[np.cumsum([len(gains) + 1 for gains, _ in group]) - 1] = True
    assert result.advantages[there].tolist() == pytest.approx(shorter.advantages.tolist())


@settings(deadline=None)
@given(BATCHES, OPTIONS)
def test_groups_do_not_meet(groups: list[Group], options: CreditOptions) -> None:
    together = to_credit(groups, options)
    alone = [to_credit([group], options) for group in groups]

    for name in ("gains", "normalised", "advantages", "mask", "zero_signal"):
        parts = [getattr(result, name) for result in alone]
        assert getattr(together, name).tolist() == np.concatenate(parts).tolist()
    for name in ("count", "mean", "std", "tied"):
        parts = [getattr(result.gain_pool, name) for result in alone]
        assert getattr(together.gain_pool, name).tolist() == np.concatenate(parts).tolist()


ANY_SCORE = st.none() | st.floats(-1e6, 1e-6) | st.sampled_from([-1e6, 1e-6, 0.0, -1e-300, -1e-6])
ANY_OUTCOME = st.none() | st.floats(-1e6, 1e6) | st.sampled_from([-1e6, 1e6, 0.0, 2e-6])
ANY_GROUP = st.lists(
    st.tuples(st.lists(ANY_SCORE, min_size=1, max_size=6), ANY_OUTCOME), min_size=1, max_size=6
)


@settings(deadline=None)
@given(ANY_GROUP, OPTIONS)
def test_no_input_gives_nan_or_an_advantage_above_the_bound(
    group: Group, options: CreditOptions
) -> None:
    result = to_credit([group], options)

    bound = advantage_bound(options, len(group), max(len(scores) for scores, _ in group))
    assert np.isfinite(result.normalised).all()
    assert np.abs(result.advantages).max() <= bound * (1 + 1e-9)


@settings(deadline=None)
@given(BATCHES, OPTIONS)
def test_zero_signal_means_that_no_turn_in_the_loss_has_an_advantage(
    groups: list[Group], options: CreditOptions
) -> None:
    result = to_credit(groups, options)

    turns = np.cumsum([sum(len(scores) for scores, _ in group) for group in groups])[:-1]
    trained = np.split(np.where(result.mask, result.advantages, 0.0), turns)
    assert result.zero_signal.tolist() == [not part.any() for part in trained]


# The definition once more, rollout by rollout, with None for what is masked: slow and plain.


def slow_group(group: Group, options: CreditOptions) -> tuple[list[list[float]], list[list[bool]]]:
    """Return the advantages and the mask of each rollout."""
    rewards: list[list[float | None]] = []
    for scores, outcome in group:
        values = [s if s is None or options.gain == "log_prob" else exp(s) for s in scores]
        gains = [
            None if outcome is None or before is None or after is None else after - before
            for before, after in pairwise(values)
        ]
        rewards.append([*gains, outcome])
    normalised = slow_normalise(rewards, options.norm)
    advantages = [slow_returns(row, options) for row in normalised]
    return advantages, [[reward is not None for reward in row] for row in rewards]


def slow_normalise(rewards: list[list[float | None]], norm: Norm) -> list[list[float]]:
    gains = present(chain.from_iterable(row[:-1] for row in rewards))
    outcomes = present(row[-1] for row in rewards)
    gain_pool, outcome_pool = gains, outcomes
    if norm == "joint":
        gain_pool = outcome_pool = gains + outcomes
    result = []
    for row in rewards:
        z = []
        for index, gain in enumerate(row[:-1]):
            if norm == "per_turn_index":
                gain_pool = present(other[index] for other in rewards if index < len(other) - 1)
            z.append(0.0 if norm == "outcome_only" else slow_z(gain, gain_pool, norm == "raw"))
        result.append([*z, 0.0 if norm == "gain_only" else slow_z(row[-1], outcome_pool)])
    if norm == "scaled_separate" and gains:
        gain_size = sum(abs(z) for row in result for z in row[:-1]) / len(gains)
        outcome_size = sum(abs(row[-1]) for row in result) / max(len(outcomes), 1)
        scale = min(max(outcome_size, 0.3) / (gain_size + 1e-6), 10.0)
        result = [[*(z * scale for z in row[:-1]), row[-1]] for row in result]
    return result


def slow_z(value: float | None, pool: list[float], raw: bool = False) -> float:
    if value is None or len(pool) < 2 or pstdev(pool) < 1e-6:
        return 0.0
    if raw:
        return value / sqrt(fmean(other * other for other in pool) + 1e-8)
    return (value - fmean(pool)) / (sqrt(pstdev(pool) ** 2 + 1e-8) + 1e-6)


def slow_returns(z: list[float], options: CreditOptions) -> list[float]:
    gains, outcome = [options.gain_weight * gain for gain in z[:-1]], options.outcome_weight * z[-1]
    if options.norm == "raw":
        return [*(gain + outcome for gain in gains), outcome]
    gamma = 1.0 if options.norm == "outcome_only" else options.gamma
    returns = [outcome]
    for gain in reversed(gains):
        returns.insert(0, gain + gamma * returns[0])
    return returns


def present(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
