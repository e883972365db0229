"""One way to report a benchmark: a table on the screen, JSON with machine, date and commit."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version()}


def commit() -> str:
    """The commit measured, marked where the tree had changes."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        capture_output=True,
        text=True,
        check=False,
        cwd=RESULTS.parent,
    )
    return described.stdout.strip() or "unknown"


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows that share their keys as one aligned table."""
    titles = list(rows[0])
    cells = [[cell(row.get(title)) for title in titles] for row in rows]
    widths = [max(len(row[i]) for row in [titles, *cells]) for i in range(len(titles))]
    for row in [titles, *cells]:
        print(
            "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        )


def cells(row: Mapping[str, Any]) -> str:
    """One row on one line."""
    return ", ".join(f"{name} {cell(value)}" for name, value in row.items())


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def write(name: str, **content: Any) -> Path:
    """Write benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    head = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
    }
    path.write_text(json.dumps(head | content, indent=1) + "\n")
    return path
