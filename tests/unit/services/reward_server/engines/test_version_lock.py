"""The version lock: calls share it, a swap has it alone, and nobody starves or leaks."""

import asyncio
import random

import pytest

from services.reward_server.engines.version_lock import VersionLock

DEADLINE_S = 5.0


async def settle() -> None:
    """Let every task that can run, run until it waits."""
    for _ in range(20):
        await asyncio.sleep(0)


class Actor:
    """A task that enters the lock, notes it, and leaves when told."""

    def __init__(self, lock: VersionLock, kind: str, name: str, entered: list[str]) -> None:
        self.leave = asyncio.Event()
        self.task = asyncio.create_task(self._run(lock, kind, name, entered))

    async def _run(self, lock: VersionLock, kind: str, name: str, entered: list[str]) -> None:
        async with lock.serving() if kind == "call" else lock.swapping():
            entered.append(name)
            await self.leave.wait()

    async def finish(self) -> None:
        self.leave.set()
        async with asyncio.timeout(DEADLINE_S):
            await self.task

    async def cancel(self) -> None:
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task


async def test_calls_are_served_side_by_side() -> None:
    lock = VersionLock()
    entered: list[str] = []
    first, second = (Actor(lock, "call", name, entered) for name in "ab")
    await settle()

    assert entered == ["a", "b"]
    await first.finish()
    await second.finish()


async def test_a_swap_waits_for_the_calls_inside_and_goes_before_those_that_came_later() -> None:
    lock = VersionLock()
    entered: list[str] = []
    old = Actor(lock, "call", "old call", entered)
    await settle()
    swap = Actor(lock, "swap", "swap", entered)
    await settle()
    new = Actor(lock, "call", "new call", entered)
    await settle()
    assert entered == ["old call"]

    await old.finish()
    await settle()
    assert entered == ["old call", "swap"]

    await swap.finish()
    await settle()
    assert entered == ["old call", "swap", "new call"]
    await new.finish()


async def test_swaps_go_one_by_one_in_the_order_they_came_and_calls_after_all_of_them() -> None:
    lock = VersionLock()
    entered: list[str] = []
    first = Actor(lock, "swap", "v1", entered)
    await settle()
    call = Actor(lock, "call", "call", entered)
    second = Actor(lock, "swap", "v2", entered)
    await settle()
    third = Actor(lock, "swap", "v3", entered)
    await settle()
    for actor in (first, second, third):
        await actor.finish()
        await settle()

    assert entered == ["v1", "v2", "v3", "call"]
    await call.finish()


async def test_a_cancelled_waiting_swap_lets_the_calls_behind_it_in() -> None:
    lock = VersionLock()
    entered: list[str] = []
    inside = Actor(lock, "call", "inside", entered)
    await settle()
    swap = Actor(lock, "swap", "swap", entered)
    await settle()
    behind = Actor(lock, "call", "behind", entered)
    await settle()
    await swap.cancel()
    await settle()

    assert entered == ["inside", "behind"]
    await inside.finish()
    await behind.finish()


@pytest.mark.parametrize("kind", ["call", "swap"])
async def test_whoever_is_cancelled_or_fails_inside_gives_the_lock_back(kind: str) -> None:
    lock = VersionLock()
    entered: list[str] = []
    actor = Actor(lock, kind, "cancelled", entered)
    await settle()
    await actor.cancel()
    with pytest.raises(KeyError):
        async with lock.serving() if kind == "call" else lock.swapping():
            raise KeyError
    swap = Actor(lock, "swap", "swap", entered)
    await swap.finish()
    call = Actor(lock, "call", "call", entered)
    await call.finish()

    assert entered == ["cancelled", "swap", "call"]


async def test_a_call_cancelled_at_the_moment_it_may_enter_leaves_no_trace() -> None:
    lock = VersionLock()
    entered: list[str] = []
    swap = Actor(lock, "swap", "v1", entered)
    await settle()
    call = Actor(lock, "call", "call", entered)
    await settle()
    swap.leave.set()
    await asyncio.sleep(0)  # the swap leaves and wakes the call, which has not run yet
    await call.cancel()
    await swap.finish()
    last = Actor(lock, "swap", "v2", entered)
    await settle()

    assert entered == ["v1", "v2"]
    await last.finish()


async def test_under_random_cancellation_no_call_ever_sees_the_version_change() -> None:
    lock, rng = VersionLock(), random.Random(0)
    version, swapping = 0, False
    torn: list[int] = []

    async def call() -> None:
        async with lock.serving():
            before = version
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            if swapping or version != before:
                torn.append(before)

    async def swap() -> None:
        nonlocal version, swapping
        async with lock.swapping():
            assert not swapping
            swapping = True
            try:
                version += 1
                await asyncio.sleep(0)
            finally:
                swapping = False

    tasks: list[asyncio.Task[None]] = []
    for _ in range(2000):
        tasks.append(asyncio.create_task(swap() if rng.random() < 0.1 else call()))
        if rng.random() < 0.3:
            rng.choice(tasks).cancel()
        await asyncio.sleep(0)
    async with asyncio.timeout(DEADLINE_S):
        results = await asyncio.gather(*tasks, return_exceptions=True)

    assert not torn
    assert version > 50
    assert {type(result) for result in results} == {type(None), asyncio.CancelledError}
