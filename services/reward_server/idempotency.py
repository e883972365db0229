"""Replies kept by idempotency key, so that a retry of the same content is not scored again.

Only replies that a retry could not improve are kept: every rollout OK or INVALID. Bounded by
bytes, the least recently used leave first.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from services.reward_server.errors import DeadlinePassed, InvalidRequest
from turnwise.v1 import reward_pb2 as pb

MAX_KEY_CHARACTERS = 256
ENTRY_BYTES = 512  # what an entry costs beside its key and reply, about
FINAL = (pb.ROLLOUT_STATUS_OK, pb.ROLLOUT_STATUS_INVALID)


class Entry:
    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.finished = asyncio.Event()
        self.reply: pb.ScoreTurnsResponse | None = None  # None while, and if, there is none to keep
        self.size = 0


class ReplyStore:
    def __init__(self, max_bytes: int, on_change: Callable[[int], None] = lambda _: None) -> None:
        self._max_bytes, self._on_change = max_bytes, on_change
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self.held_bytes = 0

    async def once(
        self,
        key: str,
        digest: bytes,
        deadline: float,
        make: Callable[[], Awaitable[pb.ScoreTurnsResponse]],
    ) -> pb.ScoreTurnsResponse:
        """Return the reply kept for the key, that of the same call under way, or make one."""
        if len(key) > MAX_KEY_CHARACTERS:
            raise InvalidRequest(f"idempotency_key: exceeds {MAX_KEY_CHARACTERS} characters")
        while (entry := self._entries.get(key)) is not None:
            if entry.digest != digest:
                raise InvalidRequest("idempotency_key: was used before with other content")
            if entry.reply is not None:
                self._entries.move_to_end(key)
                return entry.reply
            try:
                async with asyncio.timeout_at(deadline):
                    await entry.finished.wait()
            except TimeoutError:
                raise DeadlinePassed("the same call is still under way") from None
            # If it left nothing to keep, this call takes its place.
            if entry.reply is not None:
                return entry.reply
        return await self._make(key, Entry(digest), make)

    async def _make(
        self, key: str, entry: Entry, make: Callable[[], Awaitable[pb.ScoreTurnsResponse]]
    ) -> pb.ScoreTurnsResponse:
        self._entries[key] = entry
        try:
            reply = await make()
            if all(score.status in FINAL for score in reply.scores):
                entry.reply = reply
                entry.size = reply.ByteSize() + len(key.encode()) + ENTRY_BYTES
            return reply
        finally:
            if entry.reply is None:
                del self._entries[key]
            else:
                self._hold(entry)
            entry.finished.set()

    def _hold(self, entry: Entry) -> None:
        self.held_bytes += entry.size
        leaving = []
        for key, oldest in self._entries.items():
            if self.held_bytes <= self._max_bytes:
                break
            if oldest.reply is not None:  # not one under way
                leaving.append(key)
                self.held_bytes -= oldest.size
        for key in leaving:
            del self._entries[key]
        self._on_change(self.held_bytes)


def content_digest(request: pb.ScoreTurnsRequest) -> bytes:
    """A digest of everything but the key."""
    content = pb.ScoreTurnsRequest()
    content.CopyFrom(request)
    content.ClearField("idempotency_key")
    return hashlib.sha256(content.SerializeToString(deterministic=True)).digest()
