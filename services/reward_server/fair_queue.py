"""Whose turn is it: clients share by tokens served, and so do the calls of one client.

Start-time fair queueing. Who has been served most waits longest; who comes new starts level with
the one served last, so a small call passes a huge one after at most the batch under way.
"""

import heapq
from itertools import count
from typing import Generic, Protocol, TypeVar

Member = TypeVar("Member")


class Turns(Generic[Member]):
    """Members ordered by the tokens they were served, since they came."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Member]] = []
        self._order = count()
        self._now = self._popped = 0.0  # tokens served to who was served last, and popped last

    def __len__(self) -> int:
        return len(self._heap)

    def enter(self, newcomer: Member) -> None:
        heapq.heappush(self._heap, (self._now, next(self._order), newcomer))

    def pop(self) -> Member:
        self._popped, _, member = heapq.heappop(self._heap)
        return member

    def served(self, tokens: int) -> None:
        """Who was popped last was served; who was not moves nothing."""
        if tokens:
            self._now = self._popped

    def again(self, member: Member, tokens: int) -> None:
        """Take back who was popped last, after so many tokens."""
        heapq.heappush(self._heap, (self._popped + tokens, next(self._order), member))


class Waiting(Protocol):
    """A call in the queue."""

    @property
    def client(self) -> str: ...

    def has_work(self) -> bool: ...


Call = TypeVar("Call", bound=Waiting)


class FairQueue(Generic[Call]):
    """Calls by client. A call without work is forgotten when its turn comes."""

    def __init__(self) -> None:
        self._clients: Turns[str] = Turns()
        self._calls: dict[str, Turns[Call]] = {}

    def add(self, call: Call) -> None:
        if call.client not in self._calls:
            self._calls[call.client] = Turns()
            self._clients.enter(call.client)
        self._calls[call.client].enter(call)

    def pop(self) -> Call | None:
        """The call whose turn it is; give it back with `served`."""
        while self._clients:
            client = self._clients.pop()
            calls = self._calls[client]
            while calls:
                call = calls.pop()
                if call.has_work():
                    return call
            del self._calls[client]
        return None

    def served(self, call: Call, tokens: int) -> None:
        """After pop: count what the call was served; it keeps a place while it has work."""
        calls = self._calls[call.client]
        calls.served(tokens)
        self._clients.served(tokens)
        if call.has_work():
            calls.again(call, tokens)
        if calls:
            self._clients.again(call.client, tokens)
        else:
            del self._calls[call.client]
