"""What the server's two front doors, gRPC and REST, share: limits, checked requests, results."""

from typing import Literal

import msgspec

from services.reward_server.engines import Route, ScoreJob, Usage
from turnwise.scores import AliasRule, GainKind

Status = Literal["OK", "INVALID", "DEADLINE", "OVERLOADED", "ERROR"]


class Limits(msgspec.Struct, frozen=True):
    """What one call may hold; a breach is INVALID and names the limit."""

    max_request_bytes: int = 64 << 20
    max_rollouts: int = 1024
    max_prefixes: int = 256
    max_answers: int = 64
    max_queued_tokens: int = 4 << 20  # unique tokens waiting to be scored, over all callers
    max_samples: int = 1024  # prompts times n
    max_running_samples: int = 4096  # sequences being sampled, over all callers
    max_sessions: int = 1024  # open at the same time, over all callers


class ScoreOptions(msgspec.Struct, frozen=True):
    """How to score; the same for all rollouts of a call."""

    gain_kind: GainKind = "log_prob"
    alias_rule: AliasRule = "max"
    scorer: Literal["policy", "reference"] = "policy"
    token_logprobs: bool = False
    min_policy_version: int = 0


class CheckedRollout(msgspec.Struct, frozen=True):
    """A rollout that passed the border: an engine can take its job as it is."""

    rollout_id: str
    group_id: str
    job: ScoreJob
    answer_leaked: bool = False


class RolloutResult(msgspec.Struct, frozen=True):
    """What became of one rollout; scores only when the status is OK."""

    rollout_id: str
    status: Status
    reason: str = ""
    scores: tuple[float, ...] = ()  # one per prefix, by the alias rule
    answer_scores: tuple[tuple[float, ...], ...] = ()  # [prefix][alias]
    token_logprobs: tuple[tuple[tuple[float, ...], ...], ...] = ()  # [prefix][alias][token]
    gains: tuple[float, ...] = ()
    policy_version: int = 0
    route: Route | str = ""
    usage: Usage = Usage()
    answer_leaked: bool = False
