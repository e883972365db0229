"""What the reward server measures. Ids are never labels; every name carries its unit."""

import time
from collections.abc import Callable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from services.reward_server.engines import EngineInfo, Usage
from turnwise.metrics import SECONDS_BUCKETS

TOKENS_BUCKETS = tuple(2**power for power in range(4, 21))  # 16 to a million
ROLLOUTS_BUCKETS = tuple(2**power for power in range(11))  # 1 to 1,024
RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1.0)
PREFIX = "turnwise_reward_"


class ServerMetrics:
    """One per process; tests give it a registry of their own."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, about, labels, registry=registry)

        def gauge(name: str, about: str) -> Gauge:
            return Gauge(PREFIX + name, about, registry=registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(PREFIX + name, about, labels, registry=registry, buckets=buckets)

        self.requests = counter("requests", "Calls by method and outcome", "method", "status")
        self.rollouts = counter("rollouts", "Rollouts by status", "status")
        self.prefixes = counter("prefixes", "Prefixes scored")
        self.tokens = counter("tokens", "Model input positions by kind", "kind")
        self.reuse = histogram(
            "reuse_ratio", "Per batch, the share of tokens_total not computed", RATIO_BUCKETS
        )
        self.queued_tokens = gauge("queued_tokens", "Unique tokens that wait for a batch")
        self.overloaded = counter("overloaded", "Calls refused because the queue was full")
        self.batch_tokens = histogram("batch_tokens", "Unique tokens of a batch", TOKENS_BUCKETS)
        self.batch_rollouts = histogram("batch_rollouts", "Rollouts of a batch", ROLLOUTS_BUCKETS)
        self.seconds = histogram(
            "seconds", "Time of a score call: queue, compute, total", SECONDS_BUCKETS, "phase"
        )
        self.policy_version = gauge("policy_version", "Policy version now served")
        self.policy_age = gauge("policy_age_seconds", "Time since that version was loaded")
        self.load_seconds = histogram("load_seconds", "Time to load a version", SECONDS_BUCKETS)
        self.load_failures = counter("load_failures", "Versions that could not be loaded")
        self.sessions = gauge("sessions", "Scoring sessions open now")
        self.sampled_tokens = counter("sampled_tokens", "Tokens sampled; rate() gives tokens/s")
        self.sequences = gauge("sequences", "Sequences being sampled now")
        self.replies_bytes = gauge("replies_bytes", "Replies kept for idempotency keys")
        self.cache_bytes = gauge("cache_bytes", "KV cache held now")
        self.cache_limit_bytes = gauge("cache_limit_bytes", "KV cache the engine may hold")
        self.memory_bytes = gauge("memory_bytes", "Weights and caches of the engine")
        self.ready = gauge("ready", "1 while calls are answered, else 0")

    def watch_engine(
        self,
        info: Callable[[], EngineInfo],
        version: Callable[[], int],
        loaded_at: Callable[[], float],
    ) -> None:
        """Have these gauges read when they are asked for; `loaded_at` is in monotonic time."""
        self.policy_version.set_function(version)
        self.policy_age.set_function(lambda: time.monotonic() - loaded_at())
        self.cache_bytes.set_function(lambda: info().cache_bytes)
        self.cache_limit_bytes.set_function(lambda: info().cache_limit_bytes)
        self.memory_bytes.set_function(lambda: info().memory_bytes)

    def count_batch(self, rollouts: int, tokens: int, seconds: float, usage: Usage) -> None:
        self.batch_rollouts.observe(rollouts)
        self.batch_tokens.observe(tokens)
        self.seconds.labels("compute").observe(seconds)
        for kind in ("total", "unique", "cached", "computed"):
            self.tokens.labels(kind).inc(getattr(usage, f"tokens_{kind}"))
        if usage.tokens_total:
            self.reuse.observe(1 - usage.tokens_computed / usage.tokens_total)

    def observe_load(self, seconds: float) -> None:
        self.load_seconds.observe(seconds)

    def count_failure(self) -> None:
        self.load_failures.inc()
