"""Render benchmarks/README.md from benchmarks/results: `make bench` ends with it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, cell

HEAD = """# Benchmarks

Every figure of this project comes from here. `make bench` runs all of it; each module prints its
tables and writes `results/NAME.json`, and `python -m benchmarks.readme` makes this page from those
files. Ratios compare things measured in the same run, minutes apart at most; these machines are
shared, so absolute times mean little.
"""
TEXTS = {
    "score": """`trie s` is the time of one cold call of the torch engine, fp32.
`limit/trie` compares it with the time that products with weights and attention would take at the
rates of one large product and one large attention call, measured just before the row: 1 is all the
machine gives.
`rate/GEMM` counts every FLOP against the product rate alone; attention runs at about 0.4 of it, so
long contexts lower this figure. `FLOP ratio` is what sharing saves on paper.""",
    "named": """Times of plain ways over the trie's. `streamed`: turn by turn on a warm cache. `own
naive`: our forward, one pass per prefix; `of FLOP ratio` is its ratio over the FLOP ratio. `HF
naive`: one transformers forward per prefix, full logits. `padded`: left-padded batches of 16 with
answer logits only. `max diff`: largest difference of any log-prob between all of these.""",
    "sampling": """Tokens per second of the torch engine's continuous batching at 128 concurrent
requests, against a lockstep padded batch written for the one model (no joining, no leaving, no
trie), and against the same engine given one request at a time.""",
    "vllm": """vLLM on this CPU: the route the engine chose against vLLM's uncached prompt_logprobs
(both with vLLM's threads), block size 32. `torch trie/cached` is our torch engine's time over the
cached route's.""",
    "credit": "Advantages for 10,000 groups of 16 rollouts of 10 turns, in groups per second.",
    "rollout": "One recorded group of 16 rollouts of 8k tokens.",
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    titles = list(rows[0])
    lines = [titles, ["---"] * len(titles)]
    lines += [[cell(row.get(title)) for title in titles] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def origin(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores"
    return f"{result['date']}, {where}, commit `{result['commit']}`."


def render(results: Mapping[str, Mapping[str, Any]]) -> str:
    score = results["score"]
    rows = score["rows"]
    plain = [{key: row[key] for key in list(row)[:6]} for row in rows]
    named = [
        {key: row[key] for key in row if key not in ("trie s", "limit/trie", "rate/GEMM")}
        for row in rows
        if "max diff" in row
    ]
    memory = ", ".join(f"{name}: {cell(mb)} MB" for name, mb in score["extra_memory_mb"].items())
    parts = [
        HEAD,
        f"## Scoring (`make bench-score`)\n\n{origin(score)}",
        "One question, P = 300 prompt tokens, answers of L = 12 tokens, T turns of S tokens, G\n"
        "rollouts, T + 1 scored prefixes each; random Qwen2-shaped models.",
        f"### Against plain ways\n\n{TEXTS['named']}\n\n{table(named)}",
        f"### vLLM\n\n{TEXTS['vllm']}\n\n{table(score['vllm'])}" if score["vllm"] else "",
        f"### Sampling\n\n{TEXTS['sampling']}\n\n{table(score['sampling'])}",
        score.get("note", ""),
        f"### Every case\n\n{TEXTS['score']}\n\n{table(plain)}",
        f"Memory that scoring T4 G4 S50 added to the loaded process: {memory}.",
    ]
    for name, title in (("credit", "Credit assignment"), ("rollout", "Recorded groups")):
        result = results[name]
        command = "`make bench-credit`"
        parts.append(f"## {title} ({command})\n\n{origin(result)} {TEXTS[name]}")
        parts.append(table(result["rows"]))
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


if __name__ == "__main__":
    read = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    Path(__file__).with_name("README.md").write_text(render(read))
