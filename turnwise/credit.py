"""Credit assignment: scores -> gains -> normalised rewards -> returns -> advantages.

Pure arithmetic on flat arrays: no torch, no I/O, no state. A rollout of T turns has T scored
prefixes (prefix k is the prompt plus the first k turns, k = 0..T-1). The first T-1 turns earn
a gain each; the last turn is the answer and earns the outcome. Whether a number is valid is
always told by a boolean array of its own: a gain of 0 is a reward, a missing one is not.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Literal, get_args

import msgspec
import numpy as np

from turnwise.credit_batch import LIMITS, BoolArray, CreditBatch, FloatArray, IntArray
from turnwise.errors import InvalidInput, require_number, require_one_of
from turnwise.scores import GainKind

Norm = Literal[
    "separate", "joint", "scaled_separate", "raw", "per_turn_index", "outcome_only", "gain_only"
]

MIN_STD = 1e-6  # A pool that spreads less carries no signal and gets zeros.
VARIANCE_FLOOR, Z_EPSILON = 1e-8, 1e-6
MIN_OUTCOME_Z, MAX_GAIN_SCALE = 0.3, 10.0  # Of `scaled_separate`.
MAX_STEPS = 1e12  # Of a curriculum.


class CreditOptions(msgspec.Struct, frozen=True):
    """How gains become advantages. The two weights act after normalisation."""

    gain: GainKind = "log_prob"
    norm: Norm = "separate"
    gamma: float = 1.0
    outcome_weight: float = 1.0
    gain_weight: float = 1.0

    def __post_init__(self) -> None:
        require_one_of("gain", self.gain, get_args(GainKind))
        require_one_of("norm", self.norm, get_args(Norm))
        for name in ("gamma", "outcome_weight", "gain_weight"):
            require_number(name, getattr(self, name), *LIMITS[name])


PRESETS = {
    "paper": CreditOptions(),
    "paper_v1": CreditOptions(gain="prob", norm="joint"),
    "grpo": CreditOptions(norm="outcome_only"),
}


class Pool(msgspec.Struct, frozen=True, eq=False):
    """The statistics of the rewards that are normalised together, one entry per pool."""

    count: IntArray
    mean: FloatArray
    std: FloatArray  # sqrt(population variance + 1e-8)
    tied: BoolArray  # two values or more, and no spread among them

    @property
    def signal(self) -> BoolArray:
        """Return which pools can tell their values apart."""
        return (self.count >= 2) & ~self.tied

    def __getitem__(self, some: slice) -> "Pool":
        return Pool(*(getattr(self, name)[some] for name in self.__struct_fields__))


class Credit(msgspec.Struct, frozen=True, eq=False):
    """What every turn earned, one entry per turn, and the statistics, one entry per group."""

    gains: FloatArray  # 0 where there is none: last turns and invalid gains
    gain_valid: BoolArray
    normalised: FloatArray  # the reward of a turn after normalisation, before the weights
    advantages: FloatArray
    mask: BoolArray  # which turns are in the loss
    gain_pool: Pool
    outcome_pool: Pool
    joint_pool: Pool | None  # under `joint` only
    zero_signal: BoolArray  # per group: no turn in the loss has an advantage


class _Turns(msgspec.Struct, frozen=True, eq=False):
    rollout: IntArray
    group: IntArray
    last: BoolArray
    left: IntArray  # turns from this one to the end of its rollout, itself included


def credit(batch: CreditBatch, options: CreditOptions = PRESETS["paper"]) -> Credit:
    """Return the gains, normalised rewards and advantages of every turn of a batch."""
    turns, groups = _turns(batch), len(batch.rollouts_per_group)
    gains, gain_valid = _gains(batch, turns.last, options.gain)
    # A turn without a reward, and every turn of a rollout without an outcome, leaves the loss
    # and all statistics, whatever the norm: so arms compare on the same tokens.
    mask = batch.outcome_valid[turns.rollout] & (turns.last | gain_valid)
    rewards = np.where(mask, np.where(turns.last, batch.outcomes[turns.rollout], gains), 0.0)
    kind = 2 * turns.group + turns.last  # Even pools hold gains, odd pools outcomes.
    pools, z = _pool(rewards, mask, kind, 2 * groups)
    gain_pool, outcome_pool, joint_pool = pools[0::2], pools[1::2], None
    if options.norm == "joint":
        joint_pool, z = _pool(rewards, mask, turns.group, groups)
    elif options.norm == "per_turn_index":
        _, z = _pool(rewards, mask, *_turn_index_pools(batch, turns))
    elif options.norm == "raw":  # The mean square is the variance plus the squared mean.
        scale = gain_pool.signal / np.hypot(gain_pool.std, gain_pool.mean)
        z = np.where(turns.last, z, rewards * scale[turns.group])
    elif options.norm == "scaled_separate":
        size = np.bincount(kind, np.abs(z), 2 * groups) / np.maximum(pools.count, 1)
        scale = np.maximum(size[1::2], MIN_OUTCOME_Z) / (size[0::2] + Z_EPSILON)
        z = np.where(turns.last, z, z * np.minimum(scale, MAX_GAIN_SCALE)[turns.group])
    elif options.norm in {"outcome_only", "gain_only"}:
        z = np.where(turns.last == (options.norm == "outcome_only"), z, 0.0)
    advantages = _advantages(z, turns, options)
    # A masked turn passes on later rewards only, so it is never the only one that is not 0.
    active = np.bincount(turns.group, advantages != 0.0, groups) > 0
    statistics = (gain_pool, outcome_pool, joint_pool, ~active)
    return Credit(gains, gain_valid, z, advantages, mask, *statistics)


def _turns(batch: CreditBatch) -> _Turns:
    counts = batch.turns_per_rollout
    rollout = np.repeat(np.arange(len(counts)), counts)
    left = np.cumsum(counts)[rollout] - np.arange(len(rollout))
    group = np.repeat(np.arange(len(batch.rollouts_per_group)), batch.rollouts_per_group)
    return _Turns(rollout, group[rollout], left == 1, left)


def _gains(batch: CreditBatch, last: BoolArray, kind: GainKind) -> tuple[FloatArray, BoolArray]:
    """Return one gain per turn and which of them are valid; a last turn has none."""
    values = np.where(batch.valid, batch.values, 0.0)
    gains, valid = np.zeros(len(last)), ~last
    if batch.given == "gains":
        gains[~last], valid[~last] = values, batch.valid
        return gains, valid
    if kind == "prob":
        values = np.exp(values)
    valid[:-1] &= batch.valid[:-1] & batch.valid[1:]
    gains[:-1] = np.where(valid[:-1], np.diff(values), 0.0)
    return gains, valid


def _pool(
    rewards: FloatArray, mask: BoolArray, pool: IntArray, pools: int
) -> tuple[Pool, FloatArray]:
    """Return the statistics of every pool, and the z-score of every reward in its pool."""
    count = np.bincount(pool, mask, pools)
    size, mean, centred = np.maximum(count, 1.0), np.zeros(pools), rewards
    for _ in range(2):  # The second pass takes off the rounding of the first: ties stay ties.
        shift = np.bincount(pool, centred, pools) / size
        mean += shift
        centred = np.where(mask, centred - shift[pool], 0.0)
    variance = np.bincount(pool, centred * centred, pools) / size
    std = np.sqrt(variance + VARIANCE_FLOOR)
    tied = (count >= 2) & (variance < MIN_STD**2)
    statistics = Pool(count.astype(np.int64), mean, std, tied)
    return statistics, centred * (statistics.signal / (std + Z_EPSILON))[pool]


def _turn_index_pools(batch: CreditBatch, turns: _Turns) -> tuple[IntArray, int]:
    """Return the pool of each turn, one per group and turn index, and how many there are."""
    counts, rollouts = batch.turns_per_rollout, batch.rollouts_per_group
    longest = np.maximum.reduceat(counts, np.cumsum(rollouts) - rollouts)
    # No gain has the last index of its group's longest rollout: all outcomes go there.
    index = np.where(turns.last, longest[turns.group] - 1, counts[turns.rollout] - turns.left)
    return (np.cumsum(longest) - longest)[turns.group] + index, int(longest.sum())


def _advantages(normalised: FloatArray, turns: _Turns, options: CreditOptions) -> FloatArray:
    """Return what each turn and the turns after it earned, weighted and discounted."""
    weights = np.where(turns.last, options.outcome_weight, options.gain_weight)
    rewards = normalised * weights
    if options.norm == "raw":  # No sum over turns: each has its own gain and the outcome.
        outcomes: FloatArray = rewards[np.arange(len(rewards)) + turns.left - 1]
        return outcomes + np.where(turns.last, 0.0, rewards)
    gamma = 1.0 if options.norm == "outcome_only" else options.gamma
    # R_t = z_t + gamma R_{t+1}: each pass doubles how far every turn has looked ahead.
    step, longest = 1, int(turns.left.max(initial=0))
    while step < longest:
        rewards[:-step] += gamma**step * np.where(turns.left[:-step] > step, rewards[step:], 0.0)
        step *= 2
    return rewards


def advantage_bound(options: CreditOptions, rollouts: int, turns: int) -> float:
    """Return what no advantage exceeds in a group of so many rollouts of at most `turns` turns.

    A z-score in a pool of n values is at most sqrt(n - 1) (Samuelson), a value over the root
    mean square at most sqrt(n); a return adds at most turns - 1 gains to one outcome.
    """
    gains = rollouts * (turns - 1)
    gain_z, outcome_z = sqrt(max(gains - 1, 0)), sqrt(rollouts - 1)
    gain_z, outcome_z = {
        "joint": (sqrt(gains + rollouts - 1), sqrt(gains + rollouts - 1)),
        "scaled_separate": (MAX_GAIN_SCALE * gain_z, outcome_z),
        "raw": (sqrt(gains) / max(turns - 1, 1), outcome_z),
        "per_turn_index": (sqrt(rollouts - 1), outcome_z),
        "outcome_only": (0.0, outcome_z),
        "gain_only": (gain_z, 0.0),
    }.get(options.norm, (gain_z, outcome_z))
    return options.gain_weight * (turns - 1) * gain_z + options.outcome_weight * outcome_z


def curriculum_weights(step: int, steps: int) -> tuple[float, float]:
    """Return the weights of the outcome, 0.5 -> 1, and of the gains, 1 -> 0.5, at a step."""
    require_number("step", step, 0, MAX_STEPS)
    require_number("steps", steps, 1, MAX_STEPS)
    done = min(step / steps, 1.0)
    return 0.5 + 0.5 * done, 1.0 - 0.5 * done


def token_advantages(
    advantages: FloatArray,
    turn_spans: Sequence[tuple[int, int]],
    policy_mask: BoolArray,
    turn_mask: BoolArray | None = None,
) -> FloatArray:
    """Return one advantage per token of a rollout: 0 outside the policy's turns in the loss."""
    turn_mask = np.ones(len(advantages), np.bool_) if turn_mask is None else turn_mask
    if not len(advantages) == len(turn_mask) == len(turn_spans):
        counts = f"{len(turn_spans)}, {len(advantages)} and {len(turn_mask)}"
        raise InvalidInput("turn_spans", f"spans, advantages and mask differ in length: {counts}")
    tokens, end = np.zeros(len(policy_mask)), 0
    for turn, (start, stop) in enumerate(turn_spans):
        if not end <= start < stop <= len(tokens):
            room = f"must be a span of tokens within {end}..{len(tokens)}"
            raise InvalidInput(f"turn_spans[{turn}]", f"{room}, got {start}..{stop}")
        if turn_mask[turn]:
            tokens[start:stop] = advantages[turn]
        end = stop
    return np.where(policy_mask, tokens, 0.0)
