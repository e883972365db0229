"""PolicyManager over the fake engine and real weights directories: forward only, whole or not."""

import asyncio
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from services.reward_server.engines import AnswerIds, EngineUnhealthy, ScoreJob
from services.reward_server.engines.fake_engine import FakeEngine
from services.reward_server.policy import PolicyManager
from turnwise.errors import InvalidInput
from turnwise.weights import Announcement, publish

# 3 unique positions (the last scored token is no input), so 3 * seconds_per_token to compute.
JOB = ScoreJob((1, 2, 3), (3,), (AnswerIds((4,), 0, 1),))


class Counts:
    """LoadMetrics that remember."""

    def __init__(self) -> None:
        self.loads_s: list[float] = []
        self.failures = 0

    def observe_load(self, seconds: float) -> None:
        self.loads_s.append(seconds)

    def count_failure(self) -> None:
        self.failures += 1


class PickyEngine(FakeEngine):
    """Refuses one version as another model, and fails half-way in another."""

    async def load_weights(self, directory: Path, policy_version: int) -> None:
        if policy_version == 7:
            raise ValueError("another model")
        if policy_version == 13:
            raise EngineUnhealthy("half the layers are new")
        await super().load_weights(directory, policy_version)


class Stand:
    """A manager, what it works on, and versions to load."""

    def __init__(self, root: Path, engine: FakeEngine | None = None) -> None:
        self.root, self.engine, self.counts = root, engine or FakeEngine(), Counts()
        self.manager = PolicyManager(self.engine, root, self.counts)

    def publish(self, version: int) -> Announcement:
        def write(directory: Path) -> None:
            (directory / "model.safetensors").write_bytes(b"%d" % version)

        return publish(self.root, "demo", version, write)

    async def load(self, version: int) -> float:
        new = self.publish(version)
        return await self.manager.load(new.path, new.version, new.manifest_sha256)

    def break_weights(self, new: Announcement) -> None:
        (self.root / new.path / "model.safetensors").write_bytes(b"x")


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path)


async def test_a_load_serves_the_version_and_tells_how_long_it_took(stand: Stand) -> None:
    before = time.monotonic()
    assert (stand.manager.version, stand.manager.healthy) == (0, True)

    load_s = await stand.load(42)

    assert stand.manager.version == stand.engine.policy_version == 42
    assert stand.counts.loads_s == [load_s]
    assert before < stand.manager.loaded_at - load_s
    assert stand.manager.loaded_at <= time.monotonic()
    assert (stand.counts.failures, stand.manager.last_error) == (0, "")


@pytest.mark.parametrize("version", [41, 42])
async def test_an_older_or_equal_version_is_refused_and_is_no_failure(
    stand: Stand, version: int
) -> None:
    await stand.load(42)

    with pytest.raises(InvalidInput, match=f"newer than 42, which is served, got {version}$"):
        await stand.manager.load("demo/v00000042", version)
    assert (stand.manager.version, stand.counts.failures) == (42, 0)


async def test_a_broken_directory_never_reaches_the_engine(stand: Stand) -> None:
    await stand.load(1)
    new = stand.publish(2)
    stand.break_weights(new)

    with pytest.raises(InvalidInput, match=r"model\.safetensors: .* its manifest says"):
        await stand.manager.load(new.path, 2, new.manifest_sha256)
    assert (stand.manager.version, stand.engine.policy_version) == (1, 1)
    assert (stand.manager.healthy, stand.counts.failures) == (True, 1)
    assert "model.safetensors" in stand.manager.last_error

    await stand.load(3)
    assert (stand.manager.version, stand.manager.last_error) == (3, "")


async def test_path_version_and_hash_must_fit_together(stand: Stand) -> None:
    new = stand.publish(5)

    with pytest.raises(InvalidInput, match="v00000005: holds version 5, not 6"):
        await stand.manager.load(new.path, 6, new.manifest_sha256)
    with pytest.raises(InvalidInput, match="announced was 0000"):
        await stand.manager.load(new.path, 5, "0" * 64)
    with pytest.raises(InvalidInput, match="does not lie below the weights root"):
        await stand.manager.load("../demo/v00000005", 5)
    assert stand.manager.version == 0
    await stand.manager.load(new.path, 5)  # no hash given: not checked
    assert stand.manager.version == 5


async def test_what_the_engine_refuses_leaves_the_old_version_serving(tmp_path: Path) -> None:
    stand = Stand(tmp_path, PickyEngine(policy_version=6))

    with pytest.raises(InvalidInput, match="v00000007: the engine refused it: another model"):
        await stand.load(7)
    assert (stand.manager.version, stand.manager.healthy) == (6, True)
    await stand.load(8)
    assert stand.manager.version == 8


async def test_an_engine_that_failed_half_way_is_unhealthy_for_ever(tmp_path: Path) -> None:
    stand = Stand(tmp_path, PickyEngine())
    deadline = asyncio.get_running_loop().time() + 30
    waiting = asyncio.create_task(stand.manager.wait_for(13, deadline))
    await asyncio.sleep(0)

    with pytest.raises(EngineUnhealthy, match="half the layers are new"):
        await stand.load(13)
    with pytest.raises(EngineUnhealthy, match="half the layers are new"):
        await waiting
    with pytest.raises(EngineUnhealthy, match="failed while it loaded: half the layers"):
        await stand.load(14)
    assert (stand.manager.healthy, stand.counts.failures) == (False, 1)


async def test_calls_under_way_finish_by_the_old_version(tmp_path: Path) -> None:
    stand = Stand(tmp_path, FakeEngine(seconds_per_token=0.05))
    old = asyncio.create_task(stand.engine.score([JOB]))
    await asyncio.sleep(0)

    load_s = await stand.load(1)
    new = await stand.engine.score([JOB])

    assert old.done()
    # -(1 + (1 + 2 + 3 + 4 + version) % 10) / 10
    assert [r.jobs[0].logprobs for r in (old.result(), new)] == [(((-0.1,),),), (((-0.2,),),)]
    assert (old.result().policy_version, new.policy_version) == (0, 1)
    assert load_s > 0.1


async def test_loads_at_once_go_one_by_one_and_only_forward(stand: Stand) -> None:
    news = [stand.publish(version) for version in (1, 3, 2, 4)]
    loads = [stand.manager.load(new.path, new.version, new.manifest_sha256) for new in news]
    results = await asyncio.gather(*loads, return_exceptions=True)

    assert [type(result) for result in results] == [float, float, InvalidInput, float]
    assert (stand.manager.version, stand.counts.failures) == (4, 0)


async def test_a_load_whose_caller_went_away_runs_to_its_end(tmp_path: Path) -> None:
    stand = Stand(tmp_path, FakeEngine(seconds_per_token=0.05))
    calls = asyncio.create_task(stand.engine.score([JOB]))
    load = asyncio.create_task(stand.load(1))
    await asyncio.sleep(0.05)
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load

    await stand.manager.close()
    assert calls.done()
    assert (stand.manager.version, len(stand.counts.loads_s)) == (1, 1)


async def test_waiting_for_a_version_ends_with_it_or_at_the_deadline(stand: Stand) -> None:
    now = asyncio.get_running_loop().time
    assert await stand.manager.wait_for(0, now())

    waiting = [asyncio.create_task(stand.manager.wait_for(v, now() + 30)) for v in (1, 2)]
    late = asyncio.create_task(stand.manager.wait_for(3, now() + 0.1))
    await asyncio.sleep(0)
    await stand.load(2)
    assert await asyncio.gather(*waiting) == [True, True]

    began = now()
    assert await late is False
    assert now() - began < 1
    assert await stand.manager.wait_for(3, now() - 1) is False
    assert await stand.manager.wait_for(2, now() - 1) is True


class Announcements:
    """What `watch` yields, by hand."""

    def __init__(self) -> None:
        self.news: asyncio.Queue[Announcement] = asyncio.Queue()
        self.taken = asyncio.Semaphore(0)
        self.closed = False

    async def watch(self) -> AsyncGenerator[Announcement, None]:
        try:
            while True:
                yield await self.news.get()
                self.taken.release()
        finally:
            self.closed = True

    async def tell(self, new: Announcement) -> None:
        """Return when the watcher is done with it."""
        self.news.put_nowait(new)
        await asyncio.wait_for(self.taken.acquire(), 10)


async def test_the_watcher_passes_over_a_broken_version_with_one_line(
    stand: Stand, caplog: pytest.LogCaptureFixture
) -> None:
    announcements = Announcements()
    watcher = asyncio.create_task(stand.manager.run_watcher(announcements.watch()))
    await announcements.tell(stand.publish(1))
    broken = stand.publish(2)
    stand.break_weights(broken)
    await announcements.tell(broken)
    await announcements.tell(stand.publish(1))
    await asyncio.sleep(0.05)

    assert (stand.manager.version, stand.counts.failures, stand.manager.healthy) == (1, 1, True)
    lines = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [(line.getMessage(), line.__dict__["policy_version"]) for line in lines] == [
        ("policy not loaded", 2)
    ]

    await announcements.tell(stand.publish(3))
    assert (stand.manager.version, stand.manager.last_error) == (3, "")
    watcher.cancel()
    await asyncio.wait([watcher])
    assert watcher.cancelled()
    assert announcements.closed


async def test_the_watcher_ends_when_the_engine_is_unhealthy(tmp_path: Path) -> None:
    stand, announcements = Stand(tmp_path, PickyEngine()), Announcements()
    announcements.news.put_nowait(stand.publish(13))

    await asyncio.wait_for(stand.manager.run_watcher(announcements.watch()), 10)
    assert (stand.manager.healthy, announcements.closed) == (False, True)
