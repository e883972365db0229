"""Score on the route trace_replay, load other weights, score again: a process of its own.

Whether Triton is there is settled when vLLM is imported, so the other tests cannot do this.
"""

import asyncio
import sys
from pathlib import Path
from typing import Any

import msgspec

from services.reward_server.engines import ScoreJob
from tests.vllm.workloads import running


async def main(old: Path, new: Path, jobs_file: Path, results_file: Path) -> None:
    jobs = msgspec.json.decode(jobs_file.read_bytes(), type=list[ScoreJob])
    limits: dict[str, Any] = {"max_tokens": 512, "max_batch_tokens": 512, "kv_cache_bytes": 1 << 26}
    async with running(old, **limits) as engine:
        results = [await engine.score(jobs), await engine.score(jobs)]
        await engine.load_weights(new, 1)
        results.append(await engine.score(jobs))
    results_file.write_bytes(msgspec.json.encode(results))


if __name__ == "__main__":
    asyncio.run(main(*map(Path, sys.argv[1:])))
