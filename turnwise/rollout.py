"""Turn, Rollout, Group: what was sampled and scored, frozen, with compact msgpack in and out.

Tokens are kept as bytes, not as lists: ids as uint32, log-probs as float32 (both little-endian),
the policy mask as bits. `pack_ids`, `pack_logprobs` and `pack_mask` make them; the properties
give them back as read-only numpy arrays. Whatever could be constructed is valid.
"""

from itertools import pairwise
from math import exp
from typing import Literal, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from turnwise.credit_batch import LIMITS, MAX_LOGPROB
from turnwise.errors import InvalidInput
from turnwise.scores import GainKind

SCHEMA_VERSION = 1
MAX_GROUP_BYTES = 64 * 2**20  # 16 rollouts x 8k tokens take about 1 MB.
GAIN_TOLERANCE = 1e-6  # Of the larger score, or of 1: what rounding may take from a gain.

Status = Literal["OK", "INVALID", "DEADLINE", "OVERLOADED", "ERROR"]
NO_OUTCOME = ("deadline", "tool_failed")  # No fault of the policy: the rollout is masked.
EndReason = Literal[
    "answered", "malformed", "out_of_turns", "out_of_tokens", "deadline", "tool_failed"
]
Metadata = dict[str, str | int | float | bool | None]


class Turn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn: tokens start..end (its tool response included), sampled by one policy version."""

    start: int
    end: int
    policy_version: int
    packed_logprobs: bytes  # behaviour log-probs (nats), one per policy token of the turn

    @property
    def logprobs(self) -> npt.NDArray[np.float32]:
        return np.frombuffer(self.packed_logprobs, dtype="<f4")

    def __post_init__(self) -> None:
        _check(0 <= self.start < self.end, "", f"tokens {self.start}..{self.end} are no span")
        _check(self.policy_version >= 0, "policy_version", f"{self.policy_version} is below 0")
        _check(len(self.packed_logprobs) % 4 == 0, "logprobs", "are no float32 values")
        good = np.isfinite(self.logprobs) & (self.logprobs <= MAX_LOGPROB)
        if not good.all():
            index = int(np.argmin(good))
            raise _ValueError(f"logprobs[{index}]", f"{self.logprobs[index]} is no log-prob")


class Rollout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One attempt at a question: the prompt, then T turns without a gap, and what they earned."""

    id: str
    packed_ids: bytes  # token ids of the prompt and all turns
    packed_mask: bytes  # one bit per token, 1 = sampled by the policy
    prompt_length: int  # tokens; turn 0 starts here
    turns: tuple[Turn, ...]
    scores: tuple[float | None, ...]  # nats per token, one per prefix 0..T-1; None = invalid
    gains: tuple[float | None, ...]  # one per turn but the last; None beside an invalid score
    gain_kind: GainKind = "log_prob"  # what the gains are differences of
    score_version: int | None = None  # the policy version that scored; None = not scored
    route: str = ""  # the route that scored; empty = not scored
    outcome: float | None = None  # None = not judged: the rollout is masked
    prediction: str | None = None  # None = the policy gave no answer
    end_reason: EndReason | None = None  # None = not known
    status: Status = "OK"
    reason: str = ""  # why the status is not OK
    metadata: Metadata = {}

    @property
    def token_ids(self) -> npt.NDArray[np.uint32]:
        return np.frombuffer(self.packed_ids, dtype="<u4")

    @property
    def policy_mask(self) -> npt.NDArray[np.bool_]:
        packed = np.frombuffer(self.packed_mask, dtype=np.uint8)
        mask = np.unpackbits(packed, count=len(self.packed_ids) // 4, bitorder="little")
        mask.flags.writeable = False
        return mask.view(np.bool_)

    @property
    def oldest_version(self) -> int | None:
        """The oldest policy version that sampled a turn; None without a turn."""
        return min((turn.policy_version for turn in self.turns), default=None)

    def __post_init__(self) -> None:
        _check(self.id != "", "id", "is empty")
        _check_tokens(self)
        _check_turns(self)
        _check_scores(self)
        _check_gains(self)
        _check(self.status in get_args(Status), "status", f"{self.status} is unknown")
        _check(self.status == "OK" or self.reason != "", "reason", f"is empty for {self.status}")
        known = self.end_reason is None or self.end_reason in get_args(EndReason)
        _check(known, "end_reason", f"{self.end_reason} is unknown")
        # What failed must not teach.
        unscored = self.status == "OK" or all(score is None for score in self.scores)
        _check(unscored, "scores", f"are not all None for {self.status}")
        masked = self.outcome is None or self.end_reason not in NO_OUTCOME
        _check(masked, "outcome", f"is not None for {self.end_reason}")


class Group(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The rollouts of one question: the unit that is pushed, read, trained and acknowledged."""

    schema_version: Literal[1] = 1
    id: str
    question: str
    answers: tuple[str, ...]  # aliases
    rollouts: tuple[Rollout, ...]
    metadata: Metadata = {}

    def __post_init__(self) -> None:
        for place in ("id", "question", "answers", "rollouts"):
            _check(len(getattr(self, place)) > 0, place, "is empty")
        _check("" not in self.answers, "answers", "hold an empty text")
        ids = [rollout.id for rollout in self.rollouts]
        _check(len(set(ids)) == len(ids), "rollouts", "two of them have the same id")


def pack_ids(token_ids: npt.ArrayLike) -> bytes:
    """Return token ids as uint32 bytes."""
    ids = _vector(token_ids, "iu", "token_ids")
    in_range = ids.size == 0 or 0 <= int(ids.min()) <= int(ids.max()) < 2**32
    _check(in_range, "token_ids", "an id lies outside 0..2^32-1")
    return ids.astype("<u4").tobytes()


def pack_mask(policy_mask: npt.ArrayLike) -> bytes:
    """Return one bit per token, lowest bit first, from booleans or from 0 and 1."""
    mask = _vector(policy_mask, "biu", "policy_mask")
    _check(bool(np.isin(mask, (0, 1)).all()), "policy_mask", "a value is neither 0 nor 1")
    return np.packbits(mask.astype(np.bool_), bitorder="little").tobytes()


def pack_logprobs(logprobs: npt.ArrayLike) -> bytes:
    """Return log-probs as float32 bytes."""
    with np.errstate(over="ignore"):  # too large becomes inf, which Turn refuses
        return _vector(logprobs, "fiu", "logprobs").astype("<f4").tobytes()


def encode_group(group: Group) -> bytes:
    """Return the group as msgpack that `decode_group` is known to accept."""
    try:
        data = msgspec.msgpack.encode(group)
    except (TypeError, ValueError, OverflowError) as error:  # a wrong type, a lone surrogate
        raise InvalidInput("group", str(error)) from error
    decode_group(data)  # Better the writer fails than every reader.
    return data


def decode_group(data: bytes, max_bytes: int = MAX_GROUP_BYTES) -> Group:
    """Return the group, or raise InvalidInput with the place that is wrong."""
    if len(data) > max_bytes:
        raise InvalidInput("group", f"{len(data)} bytes exceed the limit of {max_bytes}")
    try:
        version = _header_decoder.decode(data).schema_version
        if version != SCHEMA_VERSION:
            raise InvalidInput("schema_version", f"got {version}, can read {SCHEMA_VERSION} only")
        return _group_decoder.decode(data)
    except msgspec.ValidationError as error:
        raise _located(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput("group", str(error)) from error


def group_size_bytes(group: Group) -> int:
    """Return how many bytes the encoded group takes."""
    return len(msgspec.msgpack.encode(group))


class _Header(msgspec.Struct):
    """The version alone: every other field may change with it."""

    schema_version: int


class _ValueError(InvalidInput, ValueError):
    """InvalidInput that msgspec, because it is a ValueError, completes with rollout and turn."""


_header_decoder = msgspec.msgpack.Decoder(_Header)
_group_decoder = msgspec.msgpack.Decoder(Group)


def _check(good: bool, place: str, problem: str) -> None:
    if not good:
        raise _ValueError(place, problem)


def _check_tokens(rollout: Rollout) -> None:
    count, rest = divmod(len(rollout.packed_ids), 4)
    _check(rest == 0, "token_ids", "are no uint32 values")
    prompt_length, mask = rollout.prompt_length, rollout.policy_mask
    _check(0 < prompt_length <= count, "prompt_length", f"{prompt_length} is not in 1..{count}")
    exact = np.packbits(mask, bitorder="little").tobytes() == rollout.packed_mask
    _check(exact, "policy_mask", f"is not one bit for each of {count} tokens")
    _check(not mask[:prompt_length].any(), "policy_mask", "marks a prompt token")


def _check_turns(rollout: Rollout) -> None:
    """The turns follow the prompt and each other without a gap, up to the last token."""
    count, mask, end = len(rollout.packed_ids) // 4, rollout.policy_mask, rollout.prompt_length
    for index, turn in enumerate(rollout.turns):
        place, span = f"turns[{index}]", f"tokens {turn.start}..{turn.end}"
        _check(turn.start == end, place, f"{span} do not start at {end}, where the last part ended")
        _check(turn.end <= count, place, f"{span} end after the last of {count} tokens")
        given, wanted = len(turn.logprobs), int(np.count_nonzero(mask[turn.start : turn.end]))
        _check(given == wanted, f"{place}.logprobs", f"{given} for {wanted} policy tokens")
        end = turn.end
    _check(end == count, "turns", f"end at token {end} of {count}")


def _check_scores(rollout: Rollout) -> None:
    scores, turns = rollout.scores, len(rollout.turns)
    _check(len(scores) == turns, "scores", f"{len(scores)} for {turns} turns")
    for index, score in enumerate(scores):
        _check_number(f"scores[{index}]", score, *LIMITS["scores"])
    _check_number("outcome", rollout.outcome, *LIMITS["outcome"])
    version, unscored = rollout.score_version, all(score is None for score in scores)
    _check(version is None or version >= 0, "score_version", f"{version} is below 0")
    _check(version is not None or unscored, "score_version", "is missing for the scores")


def _check_gains(rollout: Rollout) -> None:
    """A gain is what its two scores say; it is missing where one of them is, and only there."""
    gains, kind, turns = rollout.gains, rollout.gain_kind, len(rollout.turns)
    _check(kind in get_args(GainKind), "gain_kind", f"{kind} is unknown")
    _check(len(gains) == max(turns - 1, 0), "gains", f"{len(gains)} for {turns} turns")
    for index, (gain, (before, after)) in enumerate(
        zip(gains, pairwise(rollout.scores), strict=True)
    ):
        place = f"gains[{index}]"
        if before is None or after is None:
            _check(gain is None, place, "is valid beside an invalid score")
            continue
        values = (before, after) if kind == "log_prob" else (exp(before), exp(after))
        wanted, room = values[1] - values[0], GAIN_TOLERANCE * max(1.0, *map(abs, values))
        # NaN fails every comparison.
        good = isinstance(gain, float | int) and abs(gain - wanted) <= room
        _check(good, place, f"is {gain}, but its scores give {wanted:g}")


def _check_number(place: str, value: float | None, low: float, high: float) -> None:
    if value is not None:
        _check(isinstance(value, float | int), place, f"{value!r} is no number")
        _check(low <= value <= high, place, f"{value} is not in {low:g}..{high:g}")  # nor is NaN


def _vector(values: npt.ArrayLike, kinds: str, place: str) -> npt.NDArray[np.generic]:
    """Return a flat array whose numpy kind is allowed: no text, no fractions as ids."""
    try:
        array = np.asarray(values)
    except ValueError as error:  # ragged lists
        raise _ValueError(place, "is not a flat list") from error
    _check(array.ndim == 1, place, "is not a flat list")
    _check(array.size == 0 or array.dtype.kind in kinds, place, f"holds {array.dtype} values")
    return array


def _located(error: msgspec.ValidationError) -> InvalidInput:
    """Read 'PROBLEM - at `$.rollouts[3]`' into place and problem."""
    problem, _, path = str(error).partition(" - at `$")
    place, cause = path.rstrip("`").removeprefix("."), error.__cause__
    if isinstance(cause, InvalidInput):
        place, problem = ".".join(filter(None, (place, cause.place))), cause.problem
    return InvalidInput(place or "group", " ".join(problem.split()))
