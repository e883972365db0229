"""Start the engines that the settings name; torch and vLLM load here and not before."""

import asyncio
from pathlib import Path

from services.reward_server.engines import Engine
from services.reward_server.engines.fake_engine import FakeEngine
from services.reward_server.settings import ServerSection
from turnwise.errors import TurnwiseError


def check_model(path: Path | None) -> None:
    """Say early what would fail late."""
    if path is not None and not (path / "config.json").is_file():
        problem = "holds no config.json" if path.is_dir() else "is no directory"
        raise TurnwiseError(f"model path {path}: {problem}")


async def start_engine(settings: ServerSection, model_path: Path | None, version: int) -> Engine:
    """Load one model; TurnwiseError says in one line why it cannot be served."""
    if settings.engine == "fake" or model_path is None:
        return FakeEngine(policy_version=version)
    try:
        if settings.engine == "vllm":
            return await _start_vllm(settings, model_path, version)
        return await asyncio.to_thread(_start_torch, settings, model_path, version)
    except Exception as error:  # whatever torch, vLLM or a checkpoint come up with
        cause = " ".join(str(error).split()) or type(error).__name__
        problem = f"engine {settings.engine} cannot serve it: {cause}"
        raise TurnwiseError(f"model path {model_path}: {problem}") from error


def _start_torch(settings: ServerSection, model_path: Path, version: int) -> Engine:
    from services.reward_server.engines.torch_engine import CACHE_BYTES, TorchEngine  # noqa: PLC0415

    return TorchEngine(
        model_path,
        policy_version=version,
        dtype=settings.dtype,
        device=settings.device,
        max_batch_tokens=settings.forward_tokens,
        cache_bytes=settings.cache_bytes or CACHE_BYTES,
    )


async def _start_vllm(settings: ServerSection, model_path: Path, version: int) -> Engine:
    from services.reward_server.engines.vllm_engine import VllmEngine  # noqa: PLC0415

    return await VllmEngine.start(
        model_path,
        policy_version=version,
        dtype=settings.dtype,
        kv_cache_bytes=settings.cache_bytes,
        max_batch_tokens=settings.forward_tokens,
        call_timeout_s=settings.max_call_s,
    )
