"""The life of a reward server: open the ports, load the models, serve, drain, exit."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn

from services.reward_server.engines import Engine
from services.reward_server.handlers import Handlers
from services.reward_server.metrics import ServerMetrics
from services.reward_server.policy import PolicyManager
from services.reward_server.ports import Ports, open_ports, set_health
from services.reward_server.rest import make_app
from services.reward_server.scorer import Scorer
from services.reward_server.scoring import Backend
from services.reward_server.settings import RewardServerSettings, ServerSection
from services.reward_server.start_engine import check_model, start_engine
from services.reward_server.tokenizer import TokenizerSource
from turnwise.errors import TurnwiseError
from turnwise.weights import watch

log = logging.getLogger(__name__)

StartEngine = Callable[[ServerSection, Path | None, int], Awaitable[Engine]]
VLLM_RUNNING_BATCHES = 8  # vLLM batches by itself; torch works through one batch at a time
HEALTH_S = 0.2  # how often readiness is looked at
LAST_WORDS_S = 1.0  # for replies on their way when the drain is over


async def serve(settings: RewardServerSettings, start: StartEngine = start_engine) -> None:
    """Serve until SIGTERM or SIGINT, then drain. TurnwiseError says why it cannot serve."""
    server = settings.reward_server
    check_model(server.model_path)
    check_model(server.reference_model_path)
    metrics = ServerMetrics()
    handlers = Handlers(
        metrics,
        server.limits.limits(),
        TokenizerSource(server.model_path),
        max_call_s=server.max_call_s,
        session_idle_s=server.session_idle_s,
        replies_bytes=server.replies_bytes,
    )
    token = settings.api_token.get_secret_value() if settings.api_token else None
    ports = await open_ports(server, handlers, make_app(handlers), token)
    stop = _stop_on_signals()
    log.info("ports open", extra={"port": ports.port, "http_port": ports.http_port})
    async with asyncio.TaskGroup() as tasks:
        http = tasks.create_task(ports.http.serve([ports.http_socket]))
        beat = tasks.create_task(_tell_health(handlers, ports))
        try:
            backend = await _unless_stopped(load_backend(settings, handlers, start), stop)
            handlers.serve(backend)
            await set_health(ports.health, serving=True)
            log.info("serving", extra={"policy_version": backend.policy.version})
            watcher = _start_watcher(settings, backend.policy)
            await stop.wait()
            await _drain(handlers, ports, server.drain_s)
            await _close(watcher, backend)
        finally:
            beat.cancel()
            ports.http.should_exit = True
            await ports.grpc.stop(LAST_WORDS_S)
            await http
    log.info("stopped")


async def load_backend(
    settings: RewardServerSettings, handlers: Handlers, start: StartEngine
) -> Backend:
    """Load the policy and, where there is one, the reference model."""
    server, metrics = settings.reward_server, handlers.metrics
    engine = await start(server, server.model_path, server.policy_version)
    policy = PolicyManager(engine, settings.weights_root, metrics)
    metrics.watch_engine(engine.info, lambda: policy.version, lambda: policy.loaded_at)
    reference = None
    if server.reference_model_path is not None:
        reference = await start(server, server.reference_model_path, 0)

    def unhealthy(reason: str) -> None:
        log.error("engine unhealthy", extra={"reason": reason})
        handlers.refuse(f"the engine is unhealthy: {reason}")

    def scorer(engine: Engine) -> Scorer:
        return Scorer(
            engine,
            metrics,
            batch_tokens=server.batch_tokens,
            batch_window_s=server.batch_window_s,
            max_queued_tokens=server.limits.max_queued_tokens,
            running_batches=server.running_batches
            or (VLLM_RUNNING_BATCHES if server.engine == "vllm" else 1),
            on_unhealthy=unhealthy,
        )

    return Backend(engine, scorer(engine), policy, scorer(reference) if reference else None)


async def _unless_stopped(loading: Awaitable[Backend], stop: asyncio.Event) -> Backend:
    """Await the models; a signal meanwhile ends the process, as nothing is under way."""
    load = asyncio.ensure_future(loading)
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([load, stopped], return_when=asyncio.FIRST_COMPLETED)
    if not load.done():
        log.info("stopped while loading")
        exit_now(0)  # the thread that loads cannot be cancelled
    stopped.cancel()
    return await load


async def _tell_health(handlers: Handlers, ports: Ports) -> None:
    """Keep the standard health service in step with readiness."""
    while True:
        ready, _ = await handlers.ready()
        await set_health(ports.health, serving=ready)
        await asyncio.sleep(HEALTH_S)


def _start_watcher(
    settings: RewardServerSettings, policy: PolicyManager
) -> asyncio.Task[None] | None:
    if settings.redis_url is None or settings.run is None:
        return None
    announcements = watch(settings.redis_url.get_secret_value(), settings.run)
    watcher = asyncio.create_task(policy.run_watcher(announcements))
    watcher.add_done_callback(_tell_of_watcher)
    return watcher


def _tell_of_watcher(watcher: asyncio.Task[None]) -> None:
    """It outlives every outage of Redis; should it end all the same, the log says so."""
    if not watcher.cancelled():
        log.error("policy watcher ended", extra={"reason": str(watcher.exception())})


async def _drain(handlers: Handlers, ports: Ports, drain_s: float) -> None:
    """Refuse what is new, finish what is under way, for at most `drain_s`."""
    log.info("draining", extra={"drain_s": drain_s})
    handlers.refuse("draining: the server is about to stop")
    await ports.health.enter_graceful_shutdown()
    try:
        async with asyncio.timeout(drain_s):
            await handlers.idle()
    except TimeoutError:
        log.warning("drain took too long, calls are cut off", extra={"drain_s": drain_s})


async def _close(watcher: asyncio.Task[None] | None, backend: Backend) -> None:
    if watcher is not None:
        watcher.cancel()
        await asyncio.wait([watcher])
    await backend.policy.close()
    await backend.engine.close()
    if backend.reference is not None:
        await backend.reference.engine.close()


def _stop_on_signals() -> asyncio.Event:
    """The first signal sets the event, the second ends the process at once."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stop.is_set():
            log.warning("stopped at once by a second signal")
            exit_now(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return stop


def exit_now(code: int) -> NoReturn:
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


def run(settings: RewardServerSettings, start: StartEngine = start_engine) -> None:
    """Serve; the exceptions of a task group come out as what they are."""
    try:
        asyncio.run(serve(settings, start))
    except* TurnwiseError as errors:
        raise errors.exceptions[0] from None
