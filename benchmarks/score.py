"""Scoring engines against plain ways of scoring, in one run: `make bench-score`.

Our engine runs every case; the slow baselines run on six named ones. All times are the best of
the stated repeats. `limit` is the time the products with weights would take at the GEMM rate
and attention at the rate of one large call, both measured here a moment before; rate/GEMM
counts all FLOPs against the GEMM rate alone.
"""

import argparse
import gc
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report, sampling
from benchmarks.scoring_cases import (
    Case,
    HuggingFace,
    flops,
    make_model,
    own_naive_scores,
    streamed_scores,
    trie_scores,
)
from services.reward_server.engines.attention import flash
from services.reward_server.engines.model import DecoderModel, Linear

SWEEP = [Case(t, g, s) for t in (2, 4, 8, 16) for g in (1, 4, 16) for s in (50, 200, 500)]
GOAL, LONG = Case(4, 4, 200), Case(16, 1, 200)
# Shape, vocabulary, cases of our engine, and the six cases that the slow baselines run as well.
MODELS = (
    ("5M", 32_000, SWEEP, [GOAL, LONG]),
    ("5M", 151_936, [GOAL], [GOAL]),
    ("60M", 32_000, [GOAL, LONG], [GOAL, LONG]),
    ("60M", 151_936, SWEEP, [GOAL]),
)


def seconds(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Best time of some repeats, and the last result."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - start)
    return best, result


def gemm_rate(model: DecoderModel) -> float:
    """FLOP/s of the model's widest product, by the faster kernel and number of rows."""
    config = model.config
    weight = torch.randn(2 * config.intermediate_size, config.hidden_size)
    rates: list[float] = []
    for packed in (False, True):
        linear = Linear(weight, None, packed)
        for rows in (256, 2048):
            x = torch.randn(rows, config.hidden_size)
            linear(x)
            rates.append(2 * weight.numel() * rows / seconds(partial(linear, x), 9)[0])
    return max(rates)


def attention_rate(model: DecoderModel) -> float:
    """FLOP/s of one large call of the attention kernel: 512 queries, 2,048 keys."""
    q = torch.randn(1, model.heads, 512, model.width)
    k = torch.randn(1, model.key_heads, 2048, model.width)
    flash(q, k, k, 0.0, False)
    work: int = 4 * 512 * 2048 * model.heads * model.width
    return work / seconds(lambda: flash(q, k, k, 0.0, False), 7)[0]


def measure(
    name: str, vocab: int, model: DecoderModel, case: Case, hf: HuggingFace | None
) -> dict[str, Any]:
    """One row of the table; the baselines where a Hugging Face model is given."""
    jobs = case.jobs(vocab)
    cost, naive_cost = flops(model, case, shared=True), flops(model, case, shared=False)
    gemm, attention = gemm_rate(model), attention_rate(model)
    trie, scores = seconds(lambda: trie_scores(model, jobs), 3 if cost.total < 1e12 else 1)
    limit = cost.linear / gemm + cost.attention / attention
    row: dict[str, Any] = {
        "model": f"{name} V{vocab // 1000}k",
        "case": str(case),
        "trie s": trie,
        "limit/trie": limit / trie,
        "rate/GEMM": cost.total / trie / gemm,
        "FLOP ratio": naive_cost.total / cost.total,
    }
    if hf is not None:
        row |= baselines(model, hf, jobs, trie, scores)
        row["of FLOP ratio"] = row["own naive/trie"] / row["FLOP ratio"]
    return row


def baselines(
    model: DecoderModel, hf: HuggingFace, jobs: list[Any], trie: float, scores: np.ndarray
) -> dict[str, Any]:
    """Ratios to the trie's time, and the largest difference in any log-prob."""
    ways = {
        "streamed": lambda: streamed_scores(model, jobs),
        "own naive": lambda: own_naive_scores(model, jobs),
        "HF naive": lambda: hf.naive_scores(jobs),
        "padded": lambda: hf.padded_scores(jobs),
    }
    row, worst = {}, 0.0
    for name, way in ways.items():
        took, theirs = seconds(way, 1)
        row[f"{name}/trie"] = took / trie
        worst = max(worst, float(np.abs(theirs - scores).max()))
    return row | {"max diff": worst}


def extra_memory(model: DecoderModel, case: Case, vocab: int) -> float:
    """MB that scoring a case adds to the loaded process at its peak."""
    jobs = case.jobs(vocab, seed=1)
    gc.collect()
    before, peak, done = resident_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    trie_scores(model, jobs)
    done.set()
    watcher.join()
    return max(0, peak[0] - before) / 1e6


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def vllm_rows(folder: Path) -> list[dict[str, Any]]:
    """The vLLM engine's routes, in its own environment."""
    python = Path(".venv-vllm/bin/python")
    if not python.exists():
        print("no .venv-vllm here (make install-vllm): the vLLM rows are left out")
        return []
    out = folder / "vllm.json"
    subprocess.run([python, "-m", "benchmarks.score_vllm", str(out)], check=True)
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    return rows


def scoring_rows(folder: Path, quick: bool) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Every case of every model, and the extra memory each model takes while it scores."""
    rows, memory = [], {}
    for name, vocab, cases, named in MODELS:
        directory = make_model(folder / f"{name}-{vocab}", name, vocab)
        model = DecoderModel(directory, None, torch.device("cpu"))
        small = Case(4, 4, 50)
        trie_scores(model, small.jobs(vocab))  # warm up
        memory[f"{name} V{vocab // 1000}k"] = extra_memory(model, small, vocab)
        hf = HuggingFace(directory)
        for case in named if quick else cases:
            rows.append(measure(name, vocab, model, case, hf if case in named else None))
            print(report.cells(rows[-1]), file=sys.stderr, flush=True)
    return rows, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the six named cases only")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        vllm = vllm_rows(Path(folder))
        sampled = sampling.rows(Path(folder))
        rows, memory = scoring_rows(Path(folder), args.quick)
    named = [row for row in rows if "max diff" in row]
    plain = [{key: row[key] for key in list(row)[:6]} for row in rows]
    print(f"extra memory while scoring T4 G4 S50, MB: {report.cells(memory)}")
    for title, table in (
        ("Every case", plain),
        ("Against plain ways", named),
        ("Sampling", sampled),
        ("vLLM", vllm),
    ):
        if table:
            print(f"\n{title}")
            report.print_table(table)
    path = report.write("score", rows=rows, sampling=sampled, vllm=vllm, extra_memory_mb=memory)
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
