"""Handlers over a fake engine that serves already, for tests of what they do with a call."""

from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry

from services.reward_server.engines.fake_engine import FakeEngine
from services.reward_server.handlers import Handlers
from services.reward_server.metrics import ServerMetrics
from services.reward_server.policy import PolicyManager
from services.reward_server.requests import Limits
from services.reward_server.scorer import Scorer
from services.reward_server.scoring import Backend
from services.reward_server.tokenizer import TokenizerSource
from turnwise.v1 import reward_pb2 as pb
from turnwise.weights import publish

POISON = 66

OK, INVALID, ERROR = pb.ROLLOUT_STATUS_OK, pb.ROLLOUT_STATUS_INVALID, pb.ROLLOUT_STATUS_ERROR


class Stand:
    """Handlers over an engine that serves already."""

    def __init__(
        self,
        engine: FakeEngine | None = None,
        *,
        reference: FakeEngine | None = None,
        root: Path = Path("nowhere"),
        **limits: int,
    ) -> None:
        self.registry = CollectorRegistry()
        self.metrics = ServerMetrics(self.registry)
        self.engine = engine or FakeEngine(poison_id=POISON)
        self.handlers = Handlers(
            self.metrics, Limits(**limits), TokenizerSource(None), session_idle_s=0.5
        )
        self.policy = PolicyManager(self.engine, root, self.metrics)
        second = self.scorer(reference) if reference else None
        backend = Backend(self.engine, self.scorer(self.engine), self.policy, second)
        self.handlers.serve(backend)

    def scorer(self, engine: FakeEngine) -> Scorer:
        return Scorer(
            engine,
            self.metrics,
            batch_tokens=1000,
            batch_window_s=0.0,
            max_queued_tokens=10_000,
            on_unhealthy=self.handlers.refuse,
        )

    async def score(self, *rollouts: pb.Rollout, **options: object) -> pb.ScoreTurnsResponse:
        request = pb.ScoreTurnsRequest(rollouts=rollouts, options=pb.ScoreOptions(**options))  # type: ignore[arg-type]
        return await self.handlers.score_turns(request, 5.0)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"turnwise_reward_{name}", labels)


def rollout(*ids: int, ends: Iterable[int] = (1, 3), answer: int = 5) -> pb.Rollout:
    return pb.Rollout(
        rollout_id=f"r{ids[0]}",
        token_ids=ids,
        prefix_ends=ends,
        answers=[pb.Answer(token_ids=[answer])],
    )


def publish_version(root: Path, version: int) -> pb.LoadPolicyRequest:
    def write(directory: Path) -> None:
        (directory / "model.safetensors").write_bytes(b"%d" % version)

    new = publish(root, "demo", version, write)
    return pb.LoadPolicyRequest(
        path=new.path, policy_version=new.version, manifest_sha256=new.manifest_sha256
    )
