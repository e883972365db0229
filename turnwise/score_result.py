"""Rollouts out, scores back: requests from recorded rollouts or plain ids, results as arrays.

A rollout that could not be scored has a status and a reason, never a number: asking it for its
scores or gains raises NotScored, and in the flat arrays of a result its segment is empty.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite
from typing import get_args

import msgspec
import numpy as np
import numpy.typing as npt

from turnwise import rollout as recorded
from turnwise.credit_batch import MAX_LOGPROB
from turnwise.errors import InvalidInput, NotScored, require_one_of
from turnwise.rollout import Status
from turnwise.scores import AliasRule, GainKind
from turnwise.v1 import reward_pb2 as pb

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Ids = Sequence[int] | npt.NDArray[np.integer]

SCORERS = {"policy": pb.SCORER_POLICY, "reference": pb.SCORER_REFERENCE}
NO_VERSION = -1  # in policy_versions: nothing was scored


def answer(token_ids: Ids, scored_start: int = 0, scored_end: int = 0) -> pb.Answer:
    """An answer in its wrapper; only [scored_start, scored_end) counts, by default all of it."""
    ids = _ids(token_ids)
    return pb.Answer(token_ids=ids, scored_start=scored_start, scored_end=scored_end or len(ids))


def from_ids(
    token_ids: Ids,
    prefix_ends: Ids,
    answers: Iterable[pb.Answer | Ids],
    *,
    rollout_id: str = "",
    group_id: str = "",
) -> pb.Rollout:
    """A rollout from plain lists of ids."""
    return pb.Rollout(
        rollout_id=rollout_id,
        group_id=group_id,
        token_ids=_ids(token_ids),
        prefix_ends=_ids(prefix_ends),
        answers=[a if isinstance(a, pb.Answer) else answer(a) for a in answers],
    )


def from_rollout(
    rollout: recorded.Rollout, answers: Iterable[pb.Answer | Ids], group_id: str = ""
) -> pb.Rollout:
    """A recorded rollout: its prefix k is the prompt and the first k turns."""
    if not rollout.turns:
        raise InvalidInput(f"rollout {rollout.id}", "has no turn, so there is nothing to score")
    ends = [turn.start for turn in rollout.turns]
    return from_ids(rollout.token_ids, ends, answers, rollout_id=rollout.id, group_id=group_id)


def from_group(group: recorded.Group, answers: Iterable[pb.Answer | Ids]) -> list[pb.Rollout]:
    """Every rollout of a recorded group, with the ids of the group's answers."""
    answers = [*answers]
    return [from_rollout(rollout, answers, group.id) for rollout in group.rollouts]


def score_options(
    *,
    gain: GainKind = "log_prob",
    alias: AliasRule = "max",
    scorer: str = "policy",
    token_logprobs: bool = False,
    min_policy_version: int = 0,
) -> pb.ScoreOptions:
    """How to score; the names are those of turnwise.credit."""
    require_one_of("gain", gain, get_args(GainKind))
    require_one_of("alias", alias, get_args(AliasRule))
    require_one_of("scorer", scorer, SCORERS)
    return pb.ScoreOptions(
        gain_kind=pb.GainKind.Value(f"GAIN_KIND_{gain.upper()}"),
        alias_rule=pb.AliasRule.Value(f"ALIAS_RULE_{alias.upper()}"),
        scorer=SCORERS[scorer],
        token_logprobs=token_logprobs,
        min_policy_version=min_policy_version,
    )


class Usage(msgspec.Struct, frozen=True):
    """Proof of work, in model input positions; see Usage in reward.proto."""

    tokens_total: int = 0
    tokens_unique: int = 0
    tokens_cached: int = 0
    tokens_computed: int = 0


class RolloutScore(msgspec.Struct, frozen=True, eq=False):
    """What became of one rollout: its scores, or why there are none."""

    rollout_id: str
    status: Status
    reason: str  # why the status is not OK
    policy_version: int | None  # that scored every prefix; None = not scored
    route: str
    usage: Usage
    answer_leaked: bool
    _scores: FloatArray
    _gains: FloatArray
    _answers: FloatArray
    _token_logprobs: tuple[tuple[npt.NDArray[np.float32], ...], ...]

    @property
    def ok(self) -> bool:
        return self.status == "OK"

    @property
    def scores(self) -> FloatArray:
        """One per prefix (nats per token)."""
        return self._require_scored()._scores

    @property
    def gains(self) -> FloatArray:
        """One per turn but the last; of a session's step, one per turn that ends a prefix."""
        return self._require_scored()._gains

    @property
    def answer_scores(self) -> FloatArray:
        """One row per prefix, one column per alias (nats per token)."""
        return self._require_scored()._answers

    @property
    def token_logprobs(self) -> tuple[tuple[npt.NDArray[np.float32], ...], ...]:
        """[prefix][alias][scored token] (nats); empty unless they were asked for."""
        return self._require_scored()._token_logprobs

    def _require_scored(self) -> "RolloutScore":
        if self.status != "OK":
            name = f"rollout {self.rollout_id!r}"
            raise NotScored(f"{name} has no scores: {self.status}, {self.reason}")
        return self


class Ragged(msgspec.Struct, frozen=True, eq=False):
    """Values of rollout i: values[offsets[i]:offsets[i + 1]]; empty where it was not scored."""

    values: FloatArray
    offsets: IntArray

    def __getitem__(self, index: int) -> FloatArray:
        return self.values[self.offsets[index] : self.offsets[index + 1]]


class ScoreResult(msgspec.Struct, frozen=True, eq=False):
    """The scores of a call, in the order of its rollouts."""

    rollouts: tuple[RolloutScore, ...]

    def __len__(self) -> int:
        return len(self.rollouts)

    def __iter__(self) -> Iterator[RolloutScore]:
        return iter(self.rollouts)

    def __getitem__(self, index: int) -> RolloutScore:
        return self.rollouts[index]

    @property
    def statuses(self) -> tuple[Status, ...]:
        return tuple(score.status for score in self.rollouts)

    @property
    def ok(self) -> BoolArray:
        """Which rollouts were scored: the mask."""
        return np.array([score.ok for score in self.rollouts], np.bool_)

    @property
    def policy_versions(self) -> IntArray:
        """The version that scored each rollout; NO_VERSION where the mask is false."""
        versions = (score.policy_version for score in self.rollouts)
        return np.array([NO_VERSION if v is None else v for v in versions], np.int64)

    @property
    def scores(self) -> Ragged:
        return _ragged([score._scores for score in self.rollouts])

    @property
    def gains(self) -> Ragged:
        return _ragged([score._gains for score in self.rollouts])

    @property
    def usage(self) -> Usage:
        """The sum over the rollouts."""
        names = Usage.__struct_fields__
        return Usage(*(sum(getattr(score.usage, n) for score in self.rollouts) for n in names))

    def require_ok(self) -> "ScoreResult":
        """Return self, or raise NotScored and name the first rollout without scores."""
        for score in self.rollouts:
            score._require_scored()
        return self


def with_scores(
    rollout: recorded.Rollout, score: RolloutScore, gain: GainKind = "log_prob"
) -> recorded.Rollout:
    """The recorded rollout with its scores, or with the status that says why there are none.

    `gain` is the kind that was asked for: the record keeps it beside the gains.
    """
    if not score.ok:
        return msgspec.structs.replace(
            rollout,
            scores=(None,) * len(rollout.turns),
            gains=(None,) * max(len(rollout.turns) - 1, 0),
            status=score.status,
            reason=score.reason,
        )
    return msgspec.structs.replace(
        rollout,
        scores=tuple(score.scores.tolist()),
        gains=tuple(score.gains.tolist()),
        gain_kind=gain,
        status="OK",
        reason="",
        score_version=score.policy_version,
        route=score.route,
    )


def read_score(wire: pb.RolloutScore, prefixes: int, first_prefix: int = 0) -> RolloutScore:
    """Read the scores of so many prefixes and their gains; what is no score becomes ERROR."""
    try:
        status = _STATUSES[wire.status]
    except KeyError:
        return _read(wire, "ERROR", f"the server sent status {wire.status}, which is unknown")
    gains = prefixes if first_prefix else prefixes - 1  # prefix 0 ends with no turn
    problem = _problem(wire, prefixes, gains) if status == "OK" else ""
    if problem:
        return _read(wire, "ERROR", f"the server sent {problem}")
    return _read(wire, status, wire.reason)


_STATUSES: Mapping[int, Status] = {
    pb.RolloutStatus.Value(f"ROLLOUT_STATUS_{name}"): name for name in get_args(Status)
}


def _problem(wire: pb.RolloutScore, prefixes: int, gains: int) -> str:
    if len(wire.prefixes) != prefixes:
        return f"{len(wire.prefixes)} scores for {prefixes} prefixes"
    if len(wire.gains) != gains:
        return f"{len(wire.gains)} gains for {prefixes} prefixes"
    aliases = {len(prefix.answers) for prefix in wire.prefixes}
    if len(aliases) != 1 or aliases == {0}:
        return f"scores of {sorted(aliases)} answers"
    numbers = [number for p in wire.prefixes for number in (p.score, *(a.score for a in p.answers))]
    for index, number in enumerate(numbers):
        if not (isfinite(number) and number <= MAX_LOGPROB):
            return f"{number} as score {index}"
    return "" if all(map(isfinite, wire.gains)) else "a gain that is not finite"


def _read(wire: pb.RolloutScore, status: Status, reason: str) -> RolloutScore:
    scored = list(wire.prefixes) if status == "OK" else []
    usage = wire.usage
    return RolloutScore(
        wire.rollout_id,
        status,
        reason or ("" if status == "OK" else "the server gave no reason"),
        wire.policy_version if status == "OK" else None,
        wire.route,
        Usage(*(getattr(usage, name) for name in Usage.__struct_fields__)),
        wire.answer_leaked,
        _frozen([prefix.score for prefix in scored]),
        _frozen(wire.gains if status == "OK" else []),
        _frozen([[a.score for a in prefix.answers] for prefix in scored]),
        tuple(
            tuple(np.array(a.token_logprobs, np.float32) for a in prefix.answers)
            for prefix in scored
        ),
    )


def _frozen(values: object) -> FloatArray:
    array = np.array(values, np.float64)
    array.flags.writeable = False
    return array


def _ragged(parts: Sequence[FloatArray]) -> Ragged:
    offsets = np.cumsum([0, *(len(part) for part in parts)])
    return Ragged(np.concatenate([np.empty(0), *parts]), offsets)


def _ids(values: Ids) -> list[int]:
    return values.tolist() if isinstance(values, np.ndarray) else [*values]
