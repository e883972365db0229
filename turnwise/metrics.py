"""Prometheus metrics: what every process shares, and the endpoint that serves them."""

import platform
from collections.abc import Callable
from typing import NamedTuple

from prometheus_client import Info, start_http_server

from turnwise import __version__
from turnwise.errors import TurnwiseError

# From a cached lookup to a slow forward pass: every duration in turnwise uses these.
SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

BUILD = Info("turnwise_build", "Version of turnwise and of Python")
BUILD.info({"version": __version__, "python": platform.python_version()})


class MetricsServer(NamedTuple):
    """The port that answers GET /metrics, and the way to stop it."""

    port: int
    close: Callable[[], None]


def serve_metrics(host: str, port: int) -> MetricsServer:
    """Serve the metrics of this process from a thread; port 0 takes any free one."""
    try:
        server, thread = start_http_server(port, host)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TurnwiseError(f"metrics cannot be served on {host}:{port}: {reason}") from error

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return MetricsServer(server.server_port, close)
