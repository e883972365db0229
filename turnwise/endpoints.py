"""Which reward server to ask: consistent hashing, health, and what comes after a failed call.

No socket is touched here: a client performs the calls that `Reach` wants, and reports how they
went. A key (the group id) has a home endpoint on a hash ring, and the others behind it. A server
that failed is passed over until its re-probe succeeds; then its groups come home.
"""

import random
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Literal, NamedTuple

import grpc

from turnwise.errors import (
    AccessDenied,
    DeadlineExceeded,
    InvalidInput,
    RequestRefused,
    RewardError,
    RewardOverloaded,
    RewardUnavailable,
)
from turnwise.v1 import reward_pb2 as pb

RING_POINTS = 128  # per endpoint: shares of the keys differ by about a tenth
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.1, 5.0
RETRY_AFTER_MS = "retry-after-ms"  # trailing metadata of a refusal
PROBE_TIMEOUT_S = 5.0  # a server that does not say who it is by then is passed over
MAX_FAILURES = 8  # of every endpoint, in one call: about ten seconds of back-off


class HashRing:
    """Orders names for a key; one more name takes 1/n of the keys, and moves no others."""

    def __init__(self, names: Iterable[str], points: int = RING_POINTS) -> None:
        self.names = tuple(dict.fromkeys(names))
        ring = sorted((_hash(f"{name}#{i}"), name) for name in self.names for i in range(points))
        self._hashes = [point for point, _ in ring]
        self._owners = [name for _, name in ring]

    def order(self, key: str) -> tuple[str, ...]:
        """Every name once: the key's home, then who takes over, in order."""
        start, found = bisect(self._hashes, _hash(key)), dict[str, None]()
        for step in range(len(self._owners)):
            found.setdefault(self._owners[(start + step) % len(self._owners)])
            if len(found) == len(self.names):
                break
        return tuple(found)


class Endpoint:
    """What a client knows of one server: its limits, and when to ask it again."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.info: pb.GetServerInfoResponse | None = None  # None: not asked, or failed since
        self.failures = 0  # in a row
        self.retry_at = 0.0  # seconds, monotonic clock: its next probe

    def served(self) -> pb.GetServerInfoResponse:
        """The info; another thread may have lost the server in the meantime."""
        if self.info is None:
            raise to_error(Outcome(grpc.StatusCode.UNAVAILABLE), self.address)
        return self.info

    def answered(self, info: pb.GetServerInfoResponse) -> None:
        self.info, self.failures, self.retry_at = info, 0, 0.0

    def failed(self, now: float) -> None:
        self.info, self.failures = None, self.failures + 1
        self.retry_at = now + backoff_s(self.failures)


class Outcome(NamedTuple):
    """How a call failed."""

    code: grpc.StatusCode
    details: str = ""
    retry_after_s: float | None = None  # the server's wish


class Move(NamedTuple):
    """What to do after a failed call that may safely be made again."""

    kind: Literal["wait", "elsewhere", "give_up"]
    wait_s: float = 0.0


def next_move(outcome: Outcome, attempt: int, remaining_s: float) -> Move:
    """Decide it, for every call of both clients; `attempt` counts from 1."""
    if outcome.code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}:
        return Move("elsewhere")  # CANCELLED: the server stopped; ours are never reported
    if outcome.code is grpc.StatusCode.RESOURCE_EXHAUSTED and not _too_large(outcome):
        wait_s = retry_wait_s(outcome.retry_after_s, attempt)
        return Move("wait", wait_s) if wait_s < remaining_s else Move("give_up")
    return Move("give_up")


def retry_wait_s(retry_after_s: float | None, attempt: int) -> float:
    """The server's wish and a little more, so that not all come back at once; or a back-off."""
    if retry_after_s is None:
        return backoff_s(attempt)
    return retry_after_s + random.uniform(0.0, min(1.0, retry_after_s / 4))  # noqa: S311


def backoff_s(attempt: int) -> float:
    """Twice as long after each attempt, up to a limit; random within its upper half."""
    longest_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(attempt - 1, 9))
    return random.uniform(0.5, 1.0) * longest_s  # noqa: S311


def to_outcome(error: grpc.RpcError | Exception) -> Outcome:
    """Read the failure of a call, of either gRPC API."""
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return Outcome(grpc.StatusCode.CANCELLED, type(error).__name__)
    wish = str(dict(error.trailing_metadata() or ()).get(RETRY_AFTER_MS, ""))
    retry_after_s = int(wish) / 1000 if wish.isdecimal() else None
    return Outcome(error.code(), error.details() or "", retry_after_s)


def to_error(outcome: Outcome, address: str) -> RewardError:
    """Say in one line who failed, how, and what to do."""
    code, details = outcome.code, " ".join(outcome.details.split())[:300]
    kind, advice = _ERRORS.get(code, (RequestRefused, "see the server's log"))
    if _too_large(outcome):
        kind, advice = RequestRefused, "send smaller rollouts, or raise the message limits"
    return kind(f"{address}: {details or code.name.lower()}; {advice}")


_DENIED = (AccessDenied, "check the API token and the client certificate")
_ERRORS: dict[grpc.StatusCode, tuple[type[RewardError], str]] = {
    grpc.StatusCode.UNAVAILABLE: (RewardUnavailable, "check that the server runs there"),
    grpc.StatusCode.CANCELLED: (RewardUnavailable, "the call was cut off; try again"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (RewardOverloaded, "try later, or add a server"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (DeadlineExceeded, "raise deadline_s, or send less"),
    grpc.StatusCode.UNAUTHENTICATED: _DENIED,
    grpc.StatusCode.PERMISSION_DENIED: _DENIED,
    grpc.StatusCode.INVALID_ARGUMENT: (RequestRefused, "correct the request"),
    grpc.StatusCode.UNIMPLEMENTED: (
        RequestRefused,
        "check that a turnwise reward server runs there",
    ),
}


def _too_large(outcome: Outcome) -> bool:
    """gRPC itself refuses a message with the code that means overload elsewhere."""
    return "larger than max" in outcome.details


@lru_cache(maxsize=65_536)
def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


class Call(NamedTuple):
    """A unary call that a client shall make now."""

    method: Literal["ScoreTurns", "GetServerInfo"]
    endpoint: Endpoint
    request: pb.ScoreTurnsRequest | pb.GetServerInfoRequest
    timeout_s: float


Reply = pb.ScoreTurnsResponse | pb.GetServerInfoResponse | Outcome


class Router:
    """The endpoints of one client, and the ring that orders them."""

    def __init__(self, addresses: str | Sequence[str]) -> None:
        given = [addresses] if isinstance(addresses, str) else [*addresses]
        if not given or not all(given):
            raise InvalidInput("addresses", f"must be one or more of HOST:PORT, got {given}")
        self._ring = HashRing(given)
        self.endpoints = {name: Endpoint(name) for name in self._ring.names}

    def order(self, key: str) -> list[Endpoint]:
        return [self.endpoints[name] for name in self._ring.order(key)]


@dataclass
class Reach:
    """Finds endpoints that answer, during one call of a client, and knows when to give up."""

    router: Router
    deadline: float  # seconds, monotonic clock
    fresh: bool = False  # trust only what this call has probed
    failures: Counter[str] = field(default_factory=Counter)
    last: tuple[Outcome, str] | None = None  # the failure seen last, and where
    probed: set[str] = field(default_factory=set)
    _wanted: dict[str, Endpoint] = field(default_factory=dict)
    _flying: set[str] = field(default_factory=set)

    def pick(self, key: str, now: float) -> Endpoint | None:
        """The first endpoint for the key that answers; None while a probe has to be awaited."""
        order = self.router.order(key)
        for endpoint in order:
            if endpoint.info is not None and (not self.fresh or endpoint.address in self.probed):
                return endpoint
            if endpoint.failures == 0:  # not asked yet: worth waiting for
                self._wanted[endpoint.address] = endpoint
                return None
            if now >= endpoint.retry_at:
                self._wanted[endpoint.address] = endpoint
        # Nobody answers: this call may ask each server once without regard to earlier failures.
        self._wanted |= {e.address: e for e in order if not self.failures[e.address]}
        return None

    def start(self, now: float) -> list[Call]:
        """The probes to make now."""
        timeout_s, request = min(PROBE_TIMEOUT_S, self.deadline - now), pb.GetServerInfoRequest()
        wanted = [e for name, e in self._wanted.items() if name not in self._flying]
        self._wanted = {}
        self._flying |= {endpoint.address for endpoint in wanted}
        return [Call("GetServerInfo", endpoint, request, timeout_s) for endpoint in wanted]

    def finish(self, call: Call, reply: Reply, now: float) -> None:
        """Take in how a probe went: whatever is no answer is a failure of the server."""
        self._flying.discard(call.endpoint.address)
        if isinstance(reply, pb.GetServerInfoResponse):
            self.answered(call.endpoint)
            call.endpoint.answered(reply)
        elif isinstance(reply, Outcome):
            if reply.code is grpc.StatusCode.DEADLINE_EXCEEDED:
                problem = f"no answer within {call.timeout_s:.1f} s"
                reply = Outcome(grpc.StatusCode.UNAVAILABLE, problem)
            self.failed(call.endpoint, reply, now)

    def answered(self, endpoint: Endpoint) -> None:
        self.probed.add(endpoint.address)
        self.failures[endpoint.address] = 0

    def failed(self, endpoint: Endpoint, outcome: Outcome, now: float) -> None:
        self.last = outcome, endpoint.address
        self.failures[endpoint.address] += 1
        if next_move(outcome, 1, self.deadline - now).kind == "give_up":
            self.failures[endpoint.address] += MAX_FAILURES
        endpoint.failed(now)

    def give_up(self, now: float) -> RewardError | None:
        """The error, once the deadline has passed or every endpoint failed too often."""
        tried = min(self.failures[name] for name in self.router.endpoints)
        where, problem = ", ".join(self.router.endpoints), ""
        if self.last and tried >= MAX_FAILURES:
            return to_error(*self.last)
        if self.last:
            problem = f" (last: {self.last[1]}: {self.last[0].details[:200]})"
        if now >= self.deadline:
            outcome = Outcome(grpc.StatusCode.DEADLINE_EXCEEDED, f"the deadline passed{problem}")
            return to_error(outcome, where)
        return None

    def wait_s(self, now: float) -> float:
        """How long nothing has to be done, unless a call comes back."""
        probes = [e.retry_at for e in self.router.endpoints.values() if e.retry_at > now]
        return max(0.0, min([self.deadline, *probes]) - now)
