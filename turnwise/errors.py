"""The errors a caller can act on. Each message is one line that names the place and the limit."""

import reprlib
from collections.abc import Collection
from difflib import get_close_matches
from numbers import Real
from typing import Any


class TurnwiseError(Exception):
    """Base of every error turnwise raises on purpose."""


class InvalidInput(TurnwiseError):
    """The input is wrong; `place` says where, as in groups[0].rollouts[3].scores[1]."""

    def __init__(self, place: str, problem: str) -> None:
        super().__init__(f"{place}: {problem}" if place else problem)
        self.place = place
        self.problem = problem


class NotScored(TurnwiseError):
    """A rollout has no scores; the message says which and why."""


class RewardError(TurnwiseError):
    """No usable reply from a reward server; the message names the server and what to do."""


class RewardUnavailable(RewardError):
    """No server answered."""


class RewardOverloaded(RewardError):
    """The server had no room in time."""


class DeadlineExceeded(RewardError):
    """The deadline of the call passed."""


class AccessDenied(RewardError):
    """The server does not accept the token or the certificate."""


class RequestRefused(RewardError):
    """The server could not make sense of the request; a retry cannot help."""


class StreamBroken(RewardError):
    """A session or a sample ended half-way; what came before it is not the whole."""


def nearest(name: object, known: Collection[str]) -> str:
    """The known name that comes nearest to one that is not."""
    return get_close_matches(str(name)[:64], known, n=1, cutoff=0.0)[0]


def require_one_of(place: str, value: object, allowed: Collection[str]) -> None:
    """Refuse a name that is not allowed, and say which allowed one comes nearest."""
    if value not in allowed:
        choice = f"allowed are {', '.join(allowed)}; the nearest is {nearest(value, allowed)!r}"
        raise InvalidInput(place, f"unknown name {reprlib.repr(value)}: {choice}")


def require_number(place: str, value: Any, low: float, high: float) -> None:
    """Refuse what is not a number within limits."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and low <= value <= high):  # NaN fails every comparison.
        got = f"got {reprlib.repr(value)}"
        raise InvalidInput(place, f"must be a finite number from {low:g} to {high:g}, {got}")
