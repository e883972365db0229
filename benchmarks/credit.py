"""Groups per second of credit assignment for every norm: arrays, Python lists, plain loops.

Run `.venv/bin/python -m benchmarks.credit`; it prints one table and writes
benchmarks/results/credit.json. Lists include the packing into arrays.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import numpy as np

from benchmarks.report import print_table, write
from turnwise.credit import CreditOptions, Norm, credit
from turnwise.credit_batch import CreditBatch, to_batch

GROUPS, ROLLOUTS, TURNS = 10_000, 16, 10
PLAIN_GROUPS, REPEATS = 200, 5

Group = tuple[list[list[float]], list[float]]  # the scores and the outcome of each rollout


def main() -> None:
    """Measure, print one table, write the results."""
    rng = np.random.default_rng(0)
    scores = -3.0 * rng.random((GROUPS, ROLLOUTS, TURNS))
    outcomes = rng.random((GROUPS, ROLLOUTS))
    lists = scores.reshape(-1, TURNS).tolist(), outcomes.ravel().tolist(), [ROLLOUTS] * GROUPS
    batch = to_batch(*lists)
    plain = list(zip(scores[:PLAIN_GROUPS].tolist(), outcomes[:PLAIN_GROUPS].tolist(), strict=True))
    rows = [measure(norm, batch, lists, plain) for norm in get_args(Norm)]
    print_table(rows)
    shape = {"groups": GROUPS, "rollouts": ROLLOUTS, "turns": TURNS, "loop_groups": PLAIN_GROUPS}
    write("credit", shape=shape, rows=rows)


def measure(norm: Norm, batch: CreditBatch, lists: Any, plain: list[Group]) -> dict[str, Any]:
    """Return the groups per second of one norm, each the best of a few runs."""
    options = CreditOptions(norm=norm)

    def loops() -> None:
        for scores, outcomes in plain:
            plain_credit(scores, outcomes, norm)

    arrays = GROUPS / seconds(lambda: credit(batch, options))
    packed = GROUPS / seconds(lambda: credit(to_batch(*lists), options))
    looped = PLAIN_GROUPS / seconds(loops)
    speeds = {"arrays": round(arrays), "lists": round(packed), "loops": round(looped)}
    return {"norm": norm, **speeds, "arrays/loops": round(arrays / looped)}


def seconds(work: Callable[[], object]) -> float:
    """Return the shortest time of a few runs: the one that others disturbed least."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def plain_credit(scores: list[list[float]], outcomes: list[float], norm: Norm) -> list[list[float]]:
    """Return one group's advantages as one would write them without numpy, gamma 1."""
    gains = [[after - before for before, after in pairwise(rollout)] for rollout in scores]
    pooled = [gain for rollout in gains for gain in rollout]
    gain_z, outcome_z = z_scorer(pooled), z_scorer(outcomes)
    if norm == "joint":
        gain_z = outcome_z = z_scorer(pooled + outcomes)
    last = [outcome_z(outcome) for outcome in outcomes]
    if norm == "per_turn_index":
        scorers = [z_scorer(list(column)) for column in zip(*gains, strict=True)]
        rewards = [[z(g) for z, g in zip(scorers, row, strict=True)] for row in gains]
    elif norm == "raw":
        scale = (sum(gain * gain for gain in pooled) / len(pooled) + 1e-8) ** -0.5
        rows = zip(gains, last, strict=True)
        return [[*(gain * scale + z for gain in row), z] for row, z in rows]
    else:
        rewards = [[gain_z(gain) for gain in row] for row in gains]
    if norm == "scaled_separate":
        size = sum(abs(z) for row in rewards for z in row) / len(pooled)
        scale = min(max(sum(map(abs, last)) / len(last), 0.3) / (size + 1e-6), 10.0)
        rewards = [[z * scale for z in row] for row in rewards]
    if norm == "outcome_only":
        rewards = [[0.0] * len(row) for row in rewards]
    if norm == "gain_only":
        last = [0.0] * len(last)
    return [returns([*row, z]) for row, z in zip(rewards, last, strict=True)]


def z_scorer(values: list[float]) -> Callable[[float], float]:
    """Return the function that z-scores a value of a pool."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / len(values)
    scale = 1.0 / ((variance + 1e-8) ** 0.5 + 1e-6) if variance >= 1e-12 else 0.0
    return lambda value: (value - mean) * scale


def returns(rewards: list[float]) -> list[float]:
    """Return the sum of each reward and those after it."""
    sums, total = [], 0.0
    for reward in reversed(rewards):
        total += reward
        sums.append(total)
    return sums[::-1]


if __name__ == "__main__":
    main()
