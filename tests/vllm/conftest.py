"""Two vLLM engines for the tests of this folder: each takes long to start, so few are."""

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from services.reward_server.engines import Engine
from tests.tiny_models import save_tiny_model, save_word_tokenizer
from tests.vllm.workloads import running

torch.set_num_threads(1)  # idle threads of ours would spin on the cores that vLLM needs


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tied_versions(models: Path) -> list[Path]:
    """Version 0, 1, 2 of a tied Qwen2 policy: as different as random weights are."""
    directories = [save_tiny_model(models / f"tied{v}", "qwen2", seed=v) for v in range(3)]
    save_word_tokenizer(directories[0])
    return directories


@pytest.fixture(scope="session")
def untied_versions(models: Path) -> list[Path]:
    """The same for an untied Llama; version 2 was saved in bfloat16."""
    dtypes = [torch.float32, torch.float32, torch.bfloat16]
    return [
        save_tiny_model(models / f"untied{v}", "llama", seed=v, tied=False, dtype=dtype)
        for v, dtype in enumerate(dtypes)
    ]


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_tied_engine(tied_versions: list[Path]) -> AsyncIterator[Engine]:
    async with running(tied_versions[0], processes=True) as engine:
        yield engine


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_untied_engine(untied_versions: list[Path]) -> AsyncIterator[Engine]:
    async with running(untied_versions[0]) as engine:
        yield engine


@pytest_asyncio.fixture(loop_scope="session")
async def tied_engine(shared_tied_engine: Engine, tied_versions: list[Path]) -> Engine:
    """Forced decode on version 0 of a tied Qwen2, in vLLM's usual two processes beside ours."""
    if shared_tied_engine.policy_version:
        await shared_tied_engine.load_weights(tied_versions[0], 0)
    return shared_tied_engine


@pytest_asyncio.fixture(loop_scope="session")
async def untied_engine(shared_untied_engine: Engine, untied_versions: list[Path]) -> Engine:
    """Forced decode on version 0 of an untied Llama without a tokenizer."""
    if shared_untied_engine.policy_version:
        await shared_untied_engine.load_weights(untied_versions[0], 0)
    return shared_untied_engine


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Token ids of its own for every test: none finds the cache of another."""
    return random.Random(request.node.name)
