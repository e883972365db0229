"""Settings of the reward server: section [reward_server], beside what every process shares."""

from ipaddress import ip_address
from pathlib import Path
from typing import Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from services.reward_server.requests import Limits
from turnwise.settings import Settings


class LimitSettings(BaseModel):
    """What one call may hold, and what all together; a breach names the limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_request_bytes: PositiveInt = Limits().max_request_bytes
    max_rollouts: PositiveInt = Limits().max_rollouts
    max_prefixes: PositiveInt = Limits().max_prefixes
    max_answers: PositiveInt = Limits().max_answers
    max_queued_tokens: PositiveInt = Limits().max_queued_tokens
    max_samples: PositiveInt = Limits().max_samples
    max_running_samples: PositiveInt = Limits().max_running_samples
    max_sessions: PositiveInt = Limits().max_sessions

    def limits(self) -> Limits:
        return Limits(**self.model_dump())


class ServerSection(BaseModel):
    """Everything that only the reward server reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_path: Path | None = None  # a transformers checkpoint; engine fake needs none
    reference_model_path: Path | None = None  # a frozen model for scorer=reference
    policy_version: int = Field(default=0, ge=0)  # of what lies in model_path
    engine: Literal["torch", "vllm", "fake"] = "torch"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"  # auto: cuda where there is one, else cpu
    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535)  # gRPC; 0 takes any free one
    http_port: int = Field(default=8081, ge=0, le=65535)
    tls_cert: Path | None = None  # PEM; with tls_key, both ports speak TLS
    tls_key: Path | None = None
    tls_client_ca: Path | None = None  # PEM; clients must then show a certificate it signed
    batch_tokens: PositiveInt = 8192  # unique tokens per engine call; 1 switches batching off
    batch_window_s: NonNegativeFloat = 0.002  # how long the first of a batch waits for company
    running_batches: PositiveInt | None = None  # at a time; not set: 1, with vLLM 8
    forward_tokens: PositiveInt = 8192  # per forward pass; raise until memory is full
    cache_bytes: PositiveInt | None = None  # KV cache; not set: the engine's own default
    replies_bytes: PositiveInt = 64 << 20  # replies kept for idempotency keys
    max_call_s: PositiveFloat = 600.0  # a call without a deadline gets this one
    session_idle_s: PositiveFloat = 600.0  # a session without a step ends
    drain_s: NonNegativeFloat = 30.0  # after SIGTERM, for what is under way
    limits: LimitSettings = LimitSettings()


class RewardServerSettings(Settings):
    reward_server: ServerSection = ServerSection()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        server = self.reward_server
        if server.model_path is None and server.engine != "fake":
            raise ValueError("reward_server.model_path is not set; pass --model DIR")
        if (server.tls_cert is None) != (server.tls_key is None):
            raise ValueError("reward_server.tls_cert and tls_key go together")
        if server.tls_client_ca is not None and server.tls_cert is None:
            raise ValueError("reward_server.tls_client_ca needs tls_cert and tls_key")
        if self.api_token is None and not is_loopback(server.host):
            raise ValueError(f"host {server.host} is not loopback: set TURNWISE_API_TOKEN")
        if self.redis_url is not None and self.run is None:
            raise ValueError("redis_url is set and run is not: whose weights to watch?")
        return self


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
