"""What `turnwise credit` reads and prints: JSON (or a recorded group) in, JSON out.

In: {"groups": [{"rollouts": [{"scores": [-2, null], "outcome": 1.0}]}], "options": {...}}, where
null marks an invalid number and `gains` may stand for `scores` all through the file.
"""

import json
import reprlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from turnwise.credit import PRESETS, Credit, CreditOptions, Pool
from turnwise.credit_batch import CreditBatch, to_batch
from turnwise.errors import InvalidInput, require_one_of
from turnwise.rollout import decode_group

MAX_BYTES = 12 * 2**20  # The costliest file, one rollout of 6 million turns, takes 1.4 GB.
# How a recorded group starts. JSON never does: these bytes are not even UTF-8.
MSGPACK_MAPS = [bytes([first]) for first in (*range(0x80, 0x90), 0xDE, 0xDF)]
OPTIONS = ("preset", *CreditOptions.__struct_fields__)
Given = Literal["scores", "gains"]


def read_bytes(path: str) -> bytes:
    """Return what a file holds, or standard input for "-"; read one byte past the limit at most."""
    place = "standard input" if path == "-" else path
    if not path:  # Path("") would be the current folder
        raise InvalidInput("file", "has an empty name")
    try:
        if path == "-" and sys.stdin is None:  # closed by the caller
            raise InvalidInput(place, "is closed")
        if path == "-":
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise InvalidInput(place, getattr(error, "strerror", None) or str(error)) from error
    if len(data) > MAX_BYTES:
        raise InvalidInput(place, f"is larger than the limit of {MAX_BYTES // 2**20} MiB")
    return data


def parse(data: bytes) -> tuple[CreditBatch, dict[str, Any]]:
    """Return the batch, and the options as the file gives them."""
    if data[:1] in MSGPACK_MAPS:
        rollouts = decode_group(data).rollouts
        scores, outcomes = [r.scores for r in rollouts], [r.outcome for r in rollouts]
        return to_batch(scores, outcomes, [len(rollouts)]), {}
    if not data.strip():
        raise InvalidInput("input", "is empty")
    document = _fields(_load(data), "input", ("groups", "options"))
    options = _fields(document.get("options", {}), "options", OPTIONS)
    return _batch(_entries(document, "groups", "")), options


def change_options(
    options: CreditOptions, changes: dict[str, Any], place: Callable[[str], str]
) -> CreditOptions:
    """Return the options with changes; a preset sets every option that is not named beside it."""
    named = dict(changes)
    try:
        if "preset" in named:
            preset = named.pop("preset")
            require_one_of("preset", preset, tuple(PRESETS))
            options = PRESETS[preset]
        return msgspec.structs.replace(options, **named)
    except InvalidInput as error:
        raise InvalidInput(place(error.place), error.problem) from error


def reply(batch: CreditBatch, result: Credit, options: CreditOptions) -> bytes:
    """Return the JSON for a batch, one line for each rollout."""
    # Plus 0.0: no reader should meet a -0.0.
    arrays = (result.gains, result.normalised, result.advantages)
    gains, normalised, advantages = ((array + 0.0).tolist() for array in arrays)
    for index in np.flatnonzero(~result.gain_valid):
        gains[index] = None
    mask, ends = result.mask.tolist(), np.cumsum(batch.turns_per_rollout).tolist()
    rollouts = [
        {
            "gains": gains[start : max(end - 1, start)],
            "normalised": normalised[start:end],
            "advantages": advantages[start:end],
            "mask": mask[start:end],
        }
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    last = np.cumsum(batch.rollouts_per_group).tolist()
    groups = [
        {"rollouts": rollouts[start:end], "statistics": statistics}
        for start, end, statistics in zip([0, *last], last, _statistics(result), strict=False)
    ]
    document = {
        "groups": groups,
        "options": options,
        "zero_signal_groups": float(result.zero_signal.mean()),
        "tied_outcome_groups": float(result.outcome_pool.tied.mean()),
        "tied_gain_groups": float(result.gain_pool.tied.mean()),
    }
    data = msgspec.json.encode(document)
    for start in (b'{"rollouts":', b'{"gains":[', b'"options":', b'"statistics":'):
        data = data.replace(start, b"\n" + start)
    return data + b"\n"


def _statistics(result: Credit) -> list[dict[str, Any]]:
    """Return the statistics of each group."""
    pools = {"gains": result.gain_pool, "outcomes": result.outcome_pool, "joint": result.joint_pool}
    columns = {name: _pools(pool) for name, pool in pools.items() if pool is not None}
    return [
        {name: column[group] for name, column in columns.items()} | {"zero_signal": zero}
        for group, zero in enumerate(result.zero_signal.tolist())
    ]


def _pools(pool: Pool) -> list[dict[str, Any]]:
    columns = (pool.count, pool.mean, pool.std, pool.tied)
    return [
        {"count": n, "mean": mean if n else None, "std": std if n else None, "tied": tied}
        for n, mean, std, tied in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _load(data: bytes) -> Any:
    try:
        text = data.decode().removeprefix("\ufeff")
        # Integers as floats: a huge one becomes infinite, and is refused in its place.
        return json.loads(text, parse_int=float, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"byte {error.start}", "is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise InvalidInput(f"line {error.lineno}, column {error.colno}", error.msg) from error
    except RecursionError as error:
        raise InvalidInput("input", "is nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> Any:
    """Return a dict, or the pairs as a tuple when a key repeats: `_fields` knows the place."""
    found = dict(pairs)
    return found if len(found) == len(pairs) else tuple(pairs)


def _fields(value: Any, place: str, known: tuple[str, ...]) -> dict[str, Any]:
    """Return an object that has no unknown and no repeated keys."""
    if isinstance(value, tuple):
        key, _ = Counter(key for key, _ in value).most_common(1)[0]
        raise InvalidInput(place, f"has the key {reprlib.repr(key)} more than once")
    if not isinstance(value, dict):
        raise InvalidInput(place, f"must be an object, got {reprlib.repr(value)}")
    for key in value:
        require_one_of(place, key, known)
    return value


def _entries(fields: dict[str, Any], key: str, place: str) -> list[Any]:
    """Return the list under a key, which must be there and not be empty."""
    if key not in fields:
        raise InvalidInput(place or "input", f"has no {key!r}")
    inside = f"{place}.{key}".removeprefix(".")
    entries = fields[key]
    if not isinstance(entries, list):
        raise InvalidInput(inside, f"must be a list, got {reprlib.repr(entries)}")
    if not entries and key != "gains":  # A rollout of one turn has no gain.
        raise InvalidInput(inside, "is empty")
    return entries


def _batch(groups: list[Any]) -> CreditBatch:
    values, outcomes, counts = [], [], []
    first: Given | None = None
    for i, group in enumerate(groups):
        fields = _fields(group, f"groups[{i}]", ("rollouts",))
        rollouts = _entries(fields, "rollouts", f"groups[{i}]")
        counts.append(len(rollouts))
        for j, rollout in enumerate(rollouts):
            place = f"groups[{i}].rollouts[{j}]"
            given, numbers, outcome = _rollout(rollout, place)
            first = first or given
            if given != first:
                raise InvalidInput(place, f"has {given!r}, but the first rollout has {first!r}")
            values.append(numbers)
            outcomes.append(outcome)
    return to_batch(values, outcomes, counts, first or "scores")


def _rollout(value: Any, place: str) -> tuple[Given, list[float | None], float | None]:
    fields = _fields(value, place, ("scores", "gains", "outcome"))
    given: Given = "gains" if "gains" in fields else "scores"
    if given == "gains" and "scores" in fields:
        raise InvalidInput(place, "has both 'scores' and 'gains'")
    if "outcome" not in fields:
        raise InvalidInput(place, "has no 'outcome' (write null for an invalid one)")
    return given, _entries(fields, given, place), fields["outcome"]
