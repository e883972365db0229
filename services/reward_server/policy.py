"""Which policy version is served: explicit loads, the watcher, and waiting for a version."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Protocol

from services.reward_server.engines import Engine, EngineUnhealthy
from turnwise.errors import InvalidInput
from turnwise.weights import Announcement, locate, verify

log = logging.getLogger(__name__)


class LoadMetrics(Protocol):
    """Where loads are counted."""

    def observe_load(self, seconds: float) -> None: ...

    def count_failure(self) -> None: ...


class PolicyManager:
    """Loads versions into one engine, one by one and forward only.

    Weights are verified before the engine is touched, so a broken directory leaves the old
    version serving. An engine that failed half-way is unhealthy for ever.
    """

    def __init__(self, engine: Engine, weights_root: Path, metrics: LoadMetrics) -> None:
        self._engine, self._root, self._metrics = engine, weights_root, metrics
        self._load_turn = asyncio.Lock()
        self._changed = asyncio.Condition()  # another version, or no longer healthy
        self._loads: set[asyncio.Task[float]] = set()
        self._loaded_at = time.monotonic()
        self._healthy, self._last_error = True, ""

    @property
    def version(self) -> int:
        return self._engine.policy_version

    @property
    def loaded_at(self) -> float:
        """When the version served was loaded, on the clock of time.monotonic()."""
        return self._loaded_at

    @property
    def healthy(self) -> bool:
        return self._healthy

    @property
    def last_error(self) -> str:
        """Why the last load failed; empty after one that did not."""
        return self._last_error

    async def load(self, path: str, version: int, manifest_sha256: str = "") -> float:
        """Serve the version in `path`, relative to the weights root; return the seconds it took.

        InvalidInput leaves the old version serving. A load once begun runs to its end even
        when its caller is cancelled: an engine must not be left between two versions.
        """
        task = asyncio.create_task(self._load(path, version, manifest_sha256))
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)
        return await asyncio.shield(task)

    async def wait_for(self, version: int, deadline: float) -> bool:
        """True once `version` or a newer one is served; False at the deadline (loop time).

        Raises EngineUnhealthy when no version will ever be served again.
        """
        try:
            async with asyncio.timeout_at(deadline), self._changed:
                await self._changed.wait_for(lambda: self.version >= version or not self._healthy)
        except TimeoutError:
            return self.version >= version
        self._require_healthy()
        return True

    async def run_watcher(self, announcements: AsyncGenerator[Announcement, None]) -> None:
        """Load what is announced, until cancelled or unhealthy.

        A version that is broken is left alone until another one is announced.
        """
        async with aclosing(announcements):
            async for new in announcements:
                if new.version <= self.version:
                    continue
                try:
                    await self.load(new.path, new.version, new.manifest_sha256)
                except InvalidInput:
                    continue  # logged and counted by the load
                except EngineUnhealthy:
                    return

    async def close(self) -> None:
        """Wait for loads under way; afterwards the engine may be closed."""
        await asyncio.gather(*self._loads, return_exceptions=True)

    async def _load(self, path: str, version: int, manifest_sha256: str) -> float:
        async with self._load_turn:
            self._require_healthy()
            if version <= self.version:
                problem = f"must be newer than {self.version}, which is served, got {version}"
                raise InvalidInput("policy_version", problem)
            began = time.monotonic()
            try:
                directory = await asyncio.to_thread(self._verified, path, version, manifest_sha256)
                await self._engine.load_weights(directory, version)
            except Exception as error:  # whatever an engine dislikes about a checkpoint
                await self._failed(version, error)
                if isinstance(error, EngineUnhealthy | InvalidInput):
                    raise
                raise InvalidInput(path, f"the engine refused it: {error}") from error
            self._loaded_at, self._last_error = time.monotonic(), ""
            load_s = self._loaded_at - began
            self._metrics.observe_load(load_s)
            log.info("policy loaded", extra={"policy_version": version, "load_s": round(load_s, 3)})
            await self._tell_waiting()
            return load_s

    def _verified(self, path: str, version: int, manifest_sha256: str) -> Path:
        directory = locate(self._root, path)
        manifest = verify(directory, manifest_sha256)
        if manifest.version != version:
            raise InvalidInput(path, f"holds version {manifest.version}, not {version}")
        return directory

    async def _failed(self, version: int, error: Exception) -> None:
        self._last_error = str(error)
        self._healthy = not isinstance(error, EngineUnhealthy)
        self._metrics.count_failure()
        event = "policy not loaded" if self._healthy else "engine unhealthy"
        log.error(
            event,
            extra={"policy_version": version, "served": self.version, "reason": self._last_error},
        )
        await self._tell_waiting()

    async def _tell_waiting(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _require_healthy(self) -> None:
        if not self._healthy:
            raise EngineUnhealthy(f"the engine failed while it loaded: {self._last_error}")
