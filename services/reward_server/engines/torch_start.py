"""Start the torch engine on the device asked for, or on the best there is."""

from pathlib import Path

import torch

from services.reward_server.engines.torch_engine import TorchEngine

CACHE_BYTES = 2 << 30  # KV kept between calls where nobody says how much


def start_torch(
    model_path: Path,
    policy_version: int,
    *,
    dtype: str,
    device: str,  # auto: cuda where there is one, else cpu
    max_batch_tokens: int,
    cache_bytes: int | None,
) -> TorchEngine:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return TorchEngine(
        model_path,
        policy_version=policy_version,
        dtype=dtype,
        device=device,
        max_batch_tokens=max_batch_tokens,
        cache_bytes=cache_bytes or CACHE_BYTES,
    )
