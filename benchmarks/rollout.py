"""Bytes and milliseconds of a group of 16 rollouts x 8k tokens: ours, plain msgpack, plain JSON.

Run `.venv/bin/python -m benchmarks.rollout`; it prints one table and writes
benchmarks/results/rollout.json.
"""

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np

from benchmarks.report import print_table, write
from turnwise.rollout import (
    Group,
    Rollout,
    Turn,
    decode_group,
    encode_group,
    pack_ids,
    pack_logprobs,
    pack_mask,
)
from turnwise.scores import turn_gains

ROLLOUTS, TOKENS, TURNS, PROMPT, REPEATS = 16, 8192, 10, 512, 20
POLICY_SHARE = 0.5  # of a turn's tokens; the rest is the tool response
VOCABULARY = 151_936


def make_rollout(name: str, rng: np.random.Generator) -> Rollout:
    ends = np.linspace(PROMPT, TOKENS, TURNS + 1, dtype=int).tolist()
    mask, turns = np.zeros(TOKENS, dtype=np.bool_), []
    for start, end in pairwise(ends):
        policy_tokens = round(POLICY_SHARE * (end - start))
        mask[start : start + policy_tokens] = True
        logprobs = pack_logprobs(-rng.exponential(size=policy_tokens))
        turns.append(Turn(start=start, end=end, policy_version=42, packed_logprobs=logprobs))
    scores = tuple((-rng.exponential(size=TURNS)).tolist())
    return Rollout(
        id=name,
        packed_ids=pack_ids(rng.integers(0, VOCABULARY, TOKENS)),
        packed_mask=pack_mask(mask),
        prompt_length=PROMPT,
        turns=tuple(turns),
        scores=scores,
        gains=tuple(turn_gains(scores)),
        score_version=42,
        outcome=1.0,
    )


def as_lists(group: Group) -> dict[str, Any]:
    """The same group the plain way: every array a list of numbers."""
    plain: dict[str, Any] = msgspec.to_builtins(group, builtin_types=(bytes,))
    for rollout, row in zip(group.rollouts, plain["rollouts"], strict=True):
        row["packed_ids"] = rollout.token_ids.tolist()
        row["packed_mask"] = rollout.policy_mask.tolist()
        for turn, cell in zip(rollout.turns, row["turns"], strict=True):
            cell["packed_logprobs"] = turn.logprobs.tolist()
    return plain


def median_ms(call: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def measure() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rollouts = tuple(make_rollout(f"r{index}", rng) for index in range(ROLLOUTS))
    group = Group(id="run/1", question="Who?", answers=("nobody",), rollouts=rollouts)
    lists = as_lists(group)
    formats: list[tuple[str, Callable[[], bytes], Callable[[bytes], object]]] = [
        ("turnwise, checked", lambda: encode_group(group), decode_group),
        ("msgpack, lists", lambda: msgspec.msgpack.encode(lists), msgspec.msgpack.decode),
        ("JSON, lists", lambda: json.dumps(lists).encode(), json.loads),
    ]
    rows = []
    for name, encode, decode in formats:
        data = encode()
        encode_ms, decode_ms = median_ms(encode), median_ms(partial(decode, data))
        rows.append(
            {
                "format": name,
                "bytes": len(data),
                "encode_ms": round(encode_ms, 2),
                "decode_ms": round(decode_ms, 2),
            }
        )
    return rows


def main() -> None:
    rows = measure()
    print(f"one group: {ROLLOUTS} rollouts x {TOKENS} tokens, medians of {REPEATS} runs")
    print_table(rows)
    path = write("rollout", rollouts=ROLLOUTS, tokens=TOKENS, turns=TURNS, rows=rows)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
