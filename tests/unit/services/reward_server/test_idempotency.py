"""Idempotency keys: the same reply, made once, within bounds."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from services.reward_server.errors import DeadlinePassed, InvalidRequest
from services.reward_server.idempotency import ENTRY_BYTES, ReplyStore, content_digest
from turnwise.v1 import reward_pb2 as pb

OK, LATE = pb.ROLLOUT_STATUS_OK, pb.ROLLOUT_STATUS_DEADLINE


class Maker:
    """Makes replies, each with the next version, after `gate`."""

    def __init__(self, *statuses: pb.RolloutStatus.ValueType) -> None:
        self.statuses, self.made = statuses, 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self) -> pb.ScoreTurnsResponse:
        self.made += 1
        made = self.made
        await self.gate.wait()
        scores = [pb.RolloutScore(status=status) for status in self.statuses]
        return pb.ScoreTurnsResponse(scores=scores, policy_version=made)


async def ask(
    store: ReplyStore,
    make: Callable[[], Awaitable[pb.ScoreTurnsResponse]],
    key: str = "k",
    digest: bytes = b"d",
    within_s: float = 5.0,
) -> int:
    deadline = asyncio.get_running_loop().time() + within_s
    return (await store.once(key, digest, deadline, make)).policy_version


async def test_the_same_call_again_gets_the_same_reply() -> None:
    store, make = ReplyStore(10_000), Maker(OK, pb.ROLLOUT_STATUS_INVALID)

    assert [await ask(store, make), await ask(store, make)] == [1, 1]


async def test_a_retry_while_the_first_is_under_way_waits_for_it() -> None:
    store, make = ReplyStore(10_000), Maker(OK)
    make.gate.clear()
    tasks = [asyncio.create_task(ask(store, make)) for _ in range(3)]
    await asyncio.sleep(0.01)
    make.gate.set()

    assert await asyncio.gather(*tasks) == [1, 1, 1]


async def test_a_key_used_with_other_content_is_refused() -> None:
    store, make = ReplyStore(10_000), Maker(OK)
    await ask(store, make)

    with pytest.raises(InvalidRequest, match="other content"):
        await ask(store, make, digest=b"e")


async def test_what_a_retry_could_improve_is_not_kept() -> None:
    store, make = ReplyStore(10_000), Maker(OK, LATE)

    assert [await ask(store, make), await ask(store, make)] == [1, 2]
    assert store.held_bytes == 0


async def test_a_retry_takes_over_from_a_first_call_that_was_cancelled() -> None:
    store, make = ReplyStore(10_000), Maker(OK)
    make.gate.clear()
    first = asyncio.create_task(ask(store, make))
    retry = asyncio.create_task(ask(store, make))
    await asyncio.sleep(0.01)

    first.cancel()
    await asyncio.sleep(0.01)
    make.gate.set()

    assert await retry == 2


async def test_a_retry_waits_no_longer_than_its_deadline() -> None:
    store, make = ReplyStore(10_000), Maker(OK)
    make.gate.clear()
    first = asyncio.create_task(ask(store, make))
    await asyncio.sleep(0.01)

    with pytest.raises(DeadlinePassed):
        await ask(store, make, within_s=0.01)
    make.gate.set()
    assert await first == 1


async def test_a_failed_call_leaves_nothing() -> None:
    async def fail() -> pb.ScoreTurnsResponse:
        raise RuntimeError("no")

    store = ReplyStore(10_000)
    with pytest.raises(RuntimeError):
        await ask(store, fail)

    assert await ask(store, Maker(OK)) == 1


async def test_the_least_recently_used_replies_leave_first() -> None:
    sizes: list[float] = []
    store, make = ReplyStore(2 * ENTRY_BYTES + 100, sizes.append), Maker(OK)
    for key in ("a", "b", "a", "c"):  # c pushes b out
        await ask(store, make, key)
    assert make.made == 3

    assert await ask(store, make, "a") == 1
    assert await ask(store, make, "b") == 4
    assert max(sizes) == store.held_bytes <= 2 * ENTRY_BYTES + 100


async def test_a_key_has_a_limit() -> None:
    with pytest.raises(InvalidRequest, match="256 characters"):
        await ask(ReplyStore(10), Maker(OK), key="k" * 257)


def test_the_digest_is_of_the_content_not_of_the_key() -> None:
    def digest(key: str, rollout_id: str) -> bytes:
        rollouts = [pb.Rollout(rollout_id=rollout_id)]
        return content_digest(pb.ScoreTurnsRequest(rollouts=rollouts, idempotency_key=key))

    assert digest("a", "r") == digest("b", "r") != digest("a", "s")
