"""How a client connects: options, and channels that no fork or event loop shares."""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import grpc

from turnwise.errors import (
    InvalidInput,
    TurnwiseError,
)


@dataclass(frozen=True)
class ClientOptions:
    """How a client connects and how much it sends at once."""

    deadline_s: float = 60.0  # of every call, over all its retries
    token: str | None = field(default=None, repr=False)  # sent as bearer token
    tls: bool = False  # implied by each of the three files
    ca_file: Path | None = None  # None: the roots that come with gRPC
    cert_file: Path | None = None  # of this client, for mutual TLS, with its key
    key_file: Path | None = None
    max_batch_tokens: int = 262_144  # per ScoreTurns call; a whole group may exceed it
    max_batch_rollouts: int = 256  # likewise
    max_calls: int = 8  # ScoreTurns calls in flight per `score`
    max_message_bytes: int = 256 << 20  # of a reply; what is sent is limited by the server
    keepalive_s: float = 20.0  # silence after which the server is pinged while a call runs
    keepalive_timeout_s: float = 10.0  # a server that does not answer the ping is given up

    def __post_init__(self) -> None:
        for name in ("deadline_s", "max_batch_tokens", "max_batch_rollouts", "max_calls"):
            if not getattr(self, name) > 0:
                raise InvalidInput(name, f"must be above 0, got {getattr(self, name)}")
        if (self.cert_file is None) != (self.key_file is None):
            raise InvalidInput("cert_file", "and key_file are given together or not at all")

    def credentials(self) -> grpc.ChannelCredentials | None:
        """None for a plain channel."""
        files = self.ca_file, self.key_file, self.cert_file
        if not (self.tls or any(files)):
            return None
        roots, key, chain = (path.read_bytes() if path else None for path in files)
        return grpc.ssl_channel_credentials(roots, key, chain)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def arguments(self) -> list[tuple[str, int]]:
        return [
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.keepalive_time_ms", int(self.keepalive_s * 1000)),
            ("grpc.keepalive_timeout_ms", int(self.keepalive_timeout_s * 1000)),
            # A bandwidth ping under way takes the place of a keepalive ping, with its own limit.
            ("grpc.http2.ping_timeout_ms", int(self.keepalive_timeout_s * 1000)),
            ("grpc.enable_retries", 0),  # retries are decided here, and nowhere else
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.use_local_subchannel_pool", 1),  # a closed client leaves no connection
        ]


class Forks:
    """What gRPC cannot go on with in a forked child; set in the child by `after_in_child`."""

    def __init__(self) -> None:
        self.in_flight: set[object] = set()  # calls and streams of plain clients
        self.aio_used = self.calls_cut = self.aio_cut = False
        self.inherited: list[object] = []  # channels of the parent: closing them would harm it

    def after_in_child(self) -> None:
        self.calls_cut |= bool(self.in_flight)
        self.aio_cut |= self.aio_used
        self.in_flight.clear()

    def check(self, aio: bool) -> None:
        if self.calls_cut:
            problem = "this process was forked while a reward client made a call"
            raise TurnwiseError(f"{problem}; fork before or after it, or start workers by spawn")
        if aio and self.aio_cut:
            problem = "this process was forked from one that used AsyncRewardClient"
            raise TurnwiseError(f"{problem}; use RewardClient here, or start workers by spawn")
        self.aio_used |= aio

    @contextmanager
    def calling(self) -> Iterator[None]:
        token = object()
        self.in_flight.add(token)
        try:
            yield
        finally:
            self.in_flight.discard(token)


forks = Forks()
os.register_at_fork(after_in_child=forks.after_in_child)
Channel = TypeVar("Channel")


class Channels(Generic[Channel]):
    """One channel per endpoint, in this process and event loop only."""

    def __init__(self, make: Callable[[str], Channel]) -> None:
        self._make = make
        self._pid = os.getpid()
        self._channels: dict[tuple[str, asyncio.AbstractEventLoop | None], Channel] = {}
        self.closed = False

    def get(self, address: str, loop: asyncio.AbstractEventLoop | None = None) -> Channel:
        if self.closed:
            raise TurnwiseError("the client is closed; make a new one")
        forks.check(aio=loop is not None)
        if self._pid != os.getpid():
            forks.inherited.append(self._channels)
            self._channels, self._pid = {}, os.getpid()
        for place in [key for key in self._channels if key[1] and key[1].is_closed()]:
            self._channels.pop(place, None)
        channel = self._channels.get((address, loop))
        # Of two threads that come first, both get the channel that was stored first.
        return channel or self._channels.setdefault((address, loop), self._make(address))

    def close(self) -> list[Channel]:
        """Hand out, for closing, what belongs to this process."""
        self.closed = True
        channels = [*self._channels.values()] if self._pid == os.getpid() else []
        self._channels = {}
        return channels
