"""The JSON of the REST front door: what the OpenAPI page shows, and the check of the text form.

The ids form is reward.proto as JSON: there, protobuf itself checks names and types.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

GainKind = Literal["GAIN_KIND_UNSPECIFIED", "GAIN_KIND_LOG_PROB", "GAIN_KIND_PROB"]
AliasRule = Literal[
    "ALIAS_RULE_UNSPECIFIED",
    "ALIAS_RULE_FIRST",
    "ALIAS_RULE_MAX",
    "ALIAS_RULE_LOGSUMEXP",
    "ALIAS_RULE_MEAN",
]
ScorerName = Literal["SCORER_UNSPECIFIED", "SCORER_POLICY", "SCORER_REFERENCE"]
StatusName = Literal[
    "ROLLOUT_STATUS_UNSPECIFIED",
    "ROLLOUT_STATUS_OK",
    "ROLLOUT_STATUS_INVALID",
    "ROLLOUT_STATUS_DEADLINE",
    "ROLLOUT_STATUS_OVERLOADED",
    "ROLLOUT_STATUS_ERROR",
]


class Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenSpan(Model):
    """Tokens [start, end) of a list of token ids."""

    start: NonNegativeInt = 0
    end: NonNegativeInt


class Answer(Model):
    """A reference answer in its wrapper; only tokens [scored_start, scored_end) count."""

    token_ids: list[NonNegativeInt] = Field(description="Wrapper head, answer, wrapper tail.")
    scored_start: NonNegativeInt = 0
    scored_end: NonNegativeInt = Field(default=0, description="0: the number of token_ids.")


class Rollout(Model):
    """One rollout as token ids."""

    rollout_id: str = ""
    group_id: str = Field(default="", description="Rollouts of one question share it.")
    token_ids: list[NonNegativeInt] = Field(description="Prompt and all turns, in order.")
    prefix_ends: list[NonNegativeInt] = Field(
        description="Tokens in prefix 0..T-1, increasing: the prompt plus the first k turns."
    )
    answers: list[Answer] = Field(description="Reference answers (aliases), at least one.")
    policy_spans: list[TokenSpan] = Field(
        default=[], description="What the policy wrote, in order."
    )


class ScoreOptions(Model):
    """How to score; one set of options for all rollouts of a call."""

    gain_kind: GainKind = "GAIN_KIND_LOG_PROB"
    alias_rule: AliasRule = "ALIAS_RULE_MAX"
    scorer: ScorerName = "SCORER_POLICY"
    token_logprobs: bool = False
    min_policy_version: NonNegativeInt = Field(
        default=0, description="Wait, up to the deadline, for this version. 0: any."
    )


class ScoreTurnsRequest(Model):
    """The ids form: never text, never re-tokenised."""

    rollouts: list[Rollout]
    options: ScoreOptions = ScoreOptions()
    idempotency_key: str = Field(
        default="", description="A retry with the same key and content gets the same scores."
    )


class Message(Model):
    """A chat message; the chat template gets the fields that were sent, and no other."""

    role: str
    content: str | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class Wrapper(Model):
    """What stands around each answer."""

    head: str = Field(
        description="From the assistant header to the character before the answer; end it with a "
        "newline, and the answer's first token stays clean."
    )
    tail: str = Field(default="", description="What follows the answer. Never computed.")


class TextRollout(Model):
    """One rollout as chat messages.

    The prompt is what comes before the first assistant message. A turn is an assistant message
    and the messages up to the next one; a prefix ends after the prompt and after every turn but
    the answer, so after each tool response.
    """

    rollout_id: str = ""
    group_id: str = ""
    messages: list[Message]
    answers: list[str] = Field(description="Reference answers (aliases), at least one.")


class TextPart(Model):
    """What only the text form has."""

    rollouts: list[TextRollout]
    wrapper: Wrapper
    tools: list[dict[str, Any]] | None = Field(
        default=None, description="Tool schemas for the chat template."
    )


class TextScoreRequest(TextPart):
    """The text form: the server renders and tokenises with the model's own template."""

    options: ScoreOptions = ScoreOptions()
    idempotency_key: str = ""


class Usage(Model):
    """Proof of work, in model input positions."""

    tokens_total: int
    tokens_unique: int
    tokens_cached: int
    tokens_computed: int


class AnswerScore(Model):
    """The score of one alias under one prefix."""

    score: float = Field(description="Mean log-prob of the scored tokens (nats per token).")
    token_logprobs: list[float]


class PrefixScore(Model):
    """The score of one prefix, by the alias rule."""

    score: float
    answers: list[AnswerScore]


class RolloutScore(Model):
    """What became of one rollout; only OK has scores, all else has a reason."""

    rollout_id: str
    status: StatusName
    reason: str
    prefixes: list[PrefixScore]
    gains: list[float] = Field(description="gains[t] compares prefixes t+1 and t.")
    policy_version: int
    route: str
    usage: Usage | None = None
    answer_leaked: bool


class ScoreTurnsResponse(Model):
    """Scores in the order of the request."""

    scores: list[RolloutScore]
    policy_version: int
    route: str
    usage: Usage


class TextScoreResponse(ScoreTurnsResponse):
    """The scores of a text form, and the ids form of what was scored."""

    rollouts: list[Rollout] = Field(
        description="The ids and spans used; sent back as an ids form, they score the same."
    )


class ServerLimits(Model):
    """Limits of one call; a breach names the limit."""

    max_request_bytes: int
    max_rollouts: int
    max_prefixes: int
    max_answers: int
    max_queued_tokens: int
    max_samples: int
    max_running_samples: int
    max_sessions: int


class ServerInfo(Model):
    """What is served."""

    server_version: str
    model: str
    reference_model: str
    policy_version: int
    engine: str
    route: str
    dtype: str
    device: str
    vocab_size: int
    max_tokens: int
    limits: ServerLimits


class Problem(Model):
    """Why a call failed as a whole."""

    detail: str
