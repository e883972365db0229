"""The rollouts of many groups as flat arrays: what credit assignment works on.

Whether a number is valid is always told by a boolean array of its own: a gain of 0 is a reward,
a missing one is not.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from turnwise.errors import InvalidInput, require_number

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]

MAX_LOGPROB = 1e-6  # A log-prob is at most 0; the rest is float residue.
MAX_SIZE = 1e6
# Inside these limits nothing overflows and float residue stays well below MIN_STD.
LIMITS = {
    "scores": (-MAX_SIZE, MAX_LOGPROB),
    "gains": (-MAX_SIZE, MAX_SIZE),
    "outcome": (-MAX_SIZE, MAX_SIZE),
    "gamma": (0.0, 1.0),
    "outcome_weight": (0.0, 100.0),
    "gain_weight": (0.0, 100.0),
}


class CreditBatch(msgspec.Struct, frozen=True, eq=False):
    """The rollouts of one or more groups, rollout after rollout, as flat arrays.

    `values` holds the T scores of every rollout's prefixes or, where `given` says so, the T-1
    gains of its turns. What stands at an invalid place is never looked at. A rollout without
    turns has nothing to credit and counts nowhere.
    """

    values: FloatArray
    valid: BoolArray
    turns_per_rollout: IntArray
    outcomes: FloatArray
    outcome_valid: BoolArray
    rollouts_per_group: IntArray
    given: Literal["scores", "gains"] = "scores"

    def __post_init__(self) -> None:
        turns, rollouts = self.turns_per_rollout, self.rollouts_per_group
        counts = turns - (self.given == "gains")
        for name, dtype, size in (
            ("rollouts_per_group", np.int64, len(rollouts)),
            ("turns_per_rollout", np.int64, rollouts.sum()),
            ("values", np.float64, counts.sum()),
            ("valid", np.bool_, counts.sum()),
            ("outcomes", np.float64, len(turns)),
            ("outcome_valid", np.bool_, len(turns)),
        ):
            array = getattr(self, name)
            if array.dtype != dtype or array.shape != (size,):
                got = f"{array.dtype} of shape {array.shape}"
                raise InvalidInput(name, f"must be {np.dtype(dtype)} of shape ({size},), got {got}")
        if not len(rollouts) or rollouts.min() < 1 or counts.min() < 0:
            raise InvalidInput("batch", "must hold groups with rollouts, and no count below 0")
        self._require_numbers(self.given, self.values, self.valid, counts)
        self._require_numbers("outcome", self.outcomes, self.outcome_valid, np.ones_like(turns))

    def _require_numbers(
        self, name: str, values: FloatArray, valid: BoolArray, counts: IntArray
    ) -> None:
        low, high = LIMITS[name]
        bad = np.flatnonzero(valid & ~((low <= values) & (values <= high)))
        if len(bad):
            place = _place(name, int(bad[0]), counts, self.rollouts_per_group)
            require_number(place, float(values[bad[0]]), low, high)


def _place(name: str, index: int, counts: IntArray, rollouts_per_group: IntArray) -> str:
    """Return where a number stands, as in groups[0].rollouts[3].scores[1]."""
    rollout, item = _locate(counts, index)
    group, rollout = _locate(rollouts_per_group, rollout)
    place = f"groups[{group}].rollouts[{rollout}].{name}"
    return place if name == "outcome" else f"{place}[{item}]"


def _locate(counts: IntArray, index: int) -> tuple[int, int]:
    """Return the entry that a flat index falls into, and where in it."""
    ends = np.cumsum(counts)
    entry = int(np.searchsorted(ends, index, side="right"))
    return entry, index - int(ends[entry] - counts[entry])


def to_batch(
    values: Sequence[Sequence[float | None]],
    outcomes: Sequence[float | None],
    rollouts_per_group: Sequence[int],
    given: Literal["scores", "gains"] = "scores",
) -> CreditBatch:
    """Return the batch for one list of scores (or gains) per rollout; None marks an invalid one."""
    counts = np.fromiter(map(len, values), np.int64, len(values))
    groups = np.array(rollouts_per_group, np.int64)
    flat = _numbers(given, list(chain.from_iterable(values)), counts, groups)
    judged = _numbers("outcome", outcomes, np.ones(len(outcomes), np.int64), groups)
    return CreditBatch(*flat, counts + (given == "gains"), *judged, groups, given)


def _numbers(
    name: str, values: Sequence[float | None], counts: IntArray, rollouts_per_group: IntArray
) -> tuple[FloatArray, BoolArray]:
    if not set(map(type, values)) <= {float, type(None)}:
        # numpy would take the text "-1" for a number, and fail on 10**400 without its place.
        for index, value in enumerate(values):
            try:
                require_number("", 0.0 if value is None else value, *LIMITS[name])
            except InvalidInput as error:
                place = _place(name, index, counts, rollouts_per_group)
                raise InvalidInput(place, error.problem) from error
    if None not in values:
        return np.array(values, np.float64), np.ones(len(values), np.bool_)
    valid = np.array([value is not None for value in values])
    return np.array([0.0 if value is None else value for value in values]), valid
