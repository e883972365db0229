"""Many calls may be served at once, or one swap of the weights made; a waiting swap goes first."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class VersionLock:
    """A read-write lock for one event loop; every call inside `serving` sees one version.

    A swap that waits lets no new call in, so that a steady stream of calls cannot starve it;
    calls already inside finish first. Swaps go one by one, in the order they came. A task
    that is cancelled while it waits leaves no trace, and leaving never waits. Not re-entrant.
    """

    def __init__(self) -> None:
        self._calls = 0  # inside serving()
        self._swaps = 0  # waiting or under way
        self._idle = asyncio.Event()  # set while no call is inside
        self._idle.set()
        self._open = asyncio.Event()  # set while no swap waits or is under way
        self._open.set()
        self._swap_turn = asyncio.Lock()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        # Not `if`: another swap may have come between the event and this task's turn to run.
        while self._swaps:
            await self._open.wait()
        self._calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    @asynccontextmanager
    async def swapping(self) -> AsyncIterator[None]:
        self._swaps += 1
        self._open.clear()
        try:
            async with self._swap_turn:
                await self._idle.wait()
                yield
        finally:
            self._swaps -= 1
            if not self._swaps:
                self._open.set()
