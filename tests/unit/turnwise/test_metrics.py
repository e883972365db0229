"""Metrics over real HTTP: what a Prometheus server would read."""

import platform
from urllib.request import urlopen

import pytest
from prometheus_client import Counter, Histogram

from turnwise import __version__
from turnwise.errors import TurnwiseError
from turnwise.metrics import SECONDS_BUCKETS, serve_metrics

PUSHED = Counter("turnwise_test_groups_pushed", "Groups pushed in this test")
SECONDS = Histogram("turnwise_test_seconds", "Time taken in this test", buckets=SECONDS_BUCKETS)


def test_a_scrape_shows_version_counts_and_shared_buckets() -> None:
    server = serve_metrics("127.0.0.1", 0)
    try:
        PUSHED.inc(3)
        SECONDS.observe(0.3)
        with urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=5) as response:
            lines = response.read().decode().splitlines()
    finally:
        server.close()

    python = platform.python_version()
    assert f'turnwise_build_info{{python="{python}",version="{__version__}"}} 1.0' in lines
    assert "turnwise_test_groups_pushed_total 3.0" in lines
    assert 'turnwise_test_seconds_bucket{le="0.25"} 0.0' in lines
    assert 'turnwise_test_seconds_bucket{le="0.5"} 1.0' in lines


def test_a_taken_port_is_named_and_a_closed_one_is_free_again() -> None:
    server = serve_metrics("127.0.0.1", 0)
    place = f"127.0.0.1:{server.port}"
    with pytest.raises(TurnwiseError) as error:
        serve_metrics("127.0.0.1", server.port)
    assert str(error.value) == f"metrics cannot be served on {place}: Address already in use"

    server.close()
    serve_metrics("127.0.0.1", server.port).close()


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70_000), ("203.0.113.7", 0)])
def test_an_impossible_address_is_one_line(host: str, port: int) -> None:
    with pytest.raises(TurnwiseError, match=f"^metrics cannot be served on {host}:{port}: "):
        serve_metrics(host, port)
