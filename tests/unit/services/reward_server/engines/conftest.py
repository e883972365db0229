"""Tiny checkpoints, saved once per run, and torch engines that are closed after the test."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from services.reward_server.engines.torch_engine import TorchEngine
from tests.tiny_models import save_tiny_model

SaveModel = Callable[..., Path]
StartEngine = Callable[..., TorchEngine]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products: threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SaveModel:
    """Save a tiny model (arguments of save_tiny_model), or return where it was saved before."""
    done: dict[str, Path] = {}

    def save(family: str = "qwen2", **settings: Any) -> Path:
        name = repr((family, settings))
        if name not in done:
            directory = tmp_path_factory.mktemp(family)
            done[name] = save_tiny_model(directory, family, **settings)  # type: ignore[arg-type]
        return done[name]

    return save


@pytest.fixture(scope="module")
def engines() -> Iterator[StartEngine]:
    """Start engines for a whole module; the same arguments give the same engine."""
    started: dict[str, TorchEngine] = {}

    def start(path: Path, **settings: Any) -> TorchEngine:
        name = repr((path, settings))
        if name not in started:
            started[name] = TorchEngine(path, device="cpu", **settings)
        return started[name]

    yield start
    for engine in started.values():
        asyncio.run(engine.close())


@pytest.fixture
def start() -> Iterator[StartEngine]:
    """Start engines for one test."""
    started: list[TorchEngine] = []

    def start(path: Path, **settings: Any) -> TorchEngine:
        started.append(TorchEngine(path, device="cpu", **settings))
        return started[-1]

    yield start
    for engine in started:
        asyncio.run(engine.close())
