"""The vLLM engine's cached route against vLLM's uncached prompt_logprobs, and our torch engine.

Runs in the vLLM environment; benchmarks.score calls it. One question, T6 G8 S200, 5M and 60M.
"""

import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.scoring_cases import Case, make_model, trie_scores
from services.reward_server.engines import Route, ScoreJob, ScoreResult
from services.reward_server.engines.model import DecoderModel
from services.reward_server.engines.vllm_engine import VllmEngine

CASE, VOCAB = Case(6, 8, 200), 32_000


async def timed(
    directory: Path, route: Route | None, jobs: list[ScoreJob]
) -> tuple[ScoreResult, float]:
    """One cold call over one route, and its seconds; None is the route the engine chooses."""
    engine = await VllmEngine.start(
        directory, dtype="float32", route=route, max_tokens=2048, kv_cache_bytes=2 << 30
    )
    try:
        await engine.score(Case(1, 2, 200).jobs(VOCAB, seed=9))  # warm up, other tokens
        start = time.perf_counter()
        return await engine.score(jobs), time.perf_counter() - start
    finally:
        await engine.close()


def compare(name: str, folder: Path) -> dict[str, Any]:
    directory = make_model(folder / name, name, VOCAB)
    jobs = CASE.jobs(VOCAB)
    cached, cached_s = asyncio.run(timed(directory, None, jobs))
    plain, plain_s = asyncio.run(timed(directory, "prompt_logprobs", jobs))
    with torch.inference_mode():
        model = DecoderModel(directory, None, torch.device("cpu"))
        trie_scores(model, Case(1, 2, 200).jobs(VOCAB, seed=9))
        start = time.perf_counter()
        reference = trie_scores(model, jobs)
        trie_s = time.perf_counter() - start
    usage = cached.usage
    worst = max(
        np.abs(np.array([job.logprobs for job in result.jobs]) - reference).max()
        for result in (cached, plain)
    )
    return {
        "model": f"{name} V{VOCAB // 1000}k",
        "case": str(CASE),
        "route": cached.route,
        "computed/unique": usage.tokens_computed / usage.tokens_unique,
        "total/computed": usage.tokens_total / usage.tokens_computed,
        "uncached/cached": plain_s / cached_s,
        "torch trie/cached": trie_s / cached_s,
        "max diff": float(worst),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        Path(sys.argv[1]).write_text(json.dumps([compare(n, Path(made)) for n in ("5M", "60M")]))
