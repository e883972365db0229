"""Rollouts packed into batches: groups whole, within the limits of the server."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from turnwise.v1 import reward_pb2 as pb

REQUEST_OVERHEAD_BYTES = 1024  # of a request, beside its rollouts
ROLLOUT_OVERHEAD_BYTES = 8


class Size(NamedTuple):
    """What a batch of rollouts amounts to, or may."""

    rollouts: float
    tokens: float
    size_bytes: float

    def plus(self, other: "Size") -> "Size":
        return Size(*(a + b for a, b in zip(self, other, strict=True)))

    def fits(self, limit: "Size") -> bool:
        return all(a <= b for a, b in zip(self, limit, strict=True))


def size_of(rollout: pb.Rollout) -> Size:
    """One rollout; tokens as if its prefixes shared the rollout, and its answers nothing."""
    answers = sum(answer.scored_end or len(answer.token_ids) for answer in rollout.answers)
    tokens = len(rollout.token_ids) + len(rollout.prefix_ends) * answers
    return Size(1, tokens, rollout.ByteSize() + ROLLOUT_OVERHEAD_BYTES)


def hard_limits(limits: pb.ServerLimits) -> Size:
    """What the server takes in one call; 0 is no limit."""
    room = limits.max_request_bytes and max(1, limits.max_request_bytes - REQUEST_OVERHEAD_BYTES)
    given = (limits.max_rollouts, limits.max_queued_tokens, room)
    return Size(*(limit or float("inf") for limit in given))


class Part(NamedTuple):
    """A group, or those of its rollouts that are sent again."""

    group: str
    indices: tuple[int, ...]  # into the rollouts of the call
    due: float = 0.0  # seconds, monotonic clock
    waits: int = 0  # the server had no room
    losses: int = 0  # the server was lost
    rescores: int = 0  # another part of the group was scored by a newer version
    round: int = 0  # counts what must not be answered from the memory of an earlier request
    min_version: int = 0


def batches(
    parts: Sequence[Part], sizes: Sequence[Size], soft: Size, hard: Size
) -> Iterator[list[Part]]:
    """Pack parts up to the soft limit; one larger than it goes alone, cut at the hard limit."""
    nothing = Size(0, 0, 0)
    batch: list[Part] = []
    total = nothing
    for whole in parts:
        for part in _cut(whole, sizes, hard):
            size = nothing
            for index in part.indices:
                size = size.plus(sizes[index])
            if batch and not total.plus(size).fits(soft):
                yield batch
                batch, total = [], nothing
            batch.append(part)
            total = total.plus(size)
    if batch:
        yield batch


def _cut(part: Part, sizes: Sequence[Size], hard: Size) -> Iterator[Part]:
    """Only where it exceeds the hard limit; a single rollout that does is left to the server."""
    start, total = 0, sizes[part.indices[0]]
    for end, index in enumerate(part.indices[1:], 1):
        total = total.plus(sizes[index])
        if not total.fits(hard):
            yield part._replace(indices=part.indices[start:end])
            start, total = end, sizes[index]
    yield part._replace(indices=part.indices[start:])
