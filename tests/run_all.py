"""`make test`: every test in both environments, one count of both as the last line.

Fails when a test fails, when an environment ran none, and when a test was skipped that is
not marked `gpu` (those need a CUDA device, which not every machine has).
"""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUNS = {
    "main": (".venv", "not vllm"),
    "vllm": (".venv-vllm", "vllm"),
}
# The other folders import what the vLLM environment does not have; conftest.py keeps marked
# tests out of them.
COLLECT: dict[str, list[str]] = {".venv": [], ".venv-vllm": ["tests/vllm"]}


def run(environment: str, marks: str, report: Path) -> int:
    """Run the marked tests in one environment."""
    python = ROOT / environment / "bin/python"
    if not python.exists():
        print(f"{environment} is missing: make install install-vllm")
        return 1
    command = [str(python), "-m", "pytest", "-m", marks, f"--junitxml={report}", "--durations=5"]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *COLLECT[environment]], cwd=ROOT, check=False, env=variables
    ).returncode


def count(report: Path) -> tuple[Counter[str], list[str]]:
    """Outcomes by kind, and the skipped tests that are not marked `gpu`."""
    kinds: Counter[str] = Counter()
    unexpected = []
    for case in ET.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        kind = "failed" if tags & {"failure", "error"} else "passed"
        if "skipped" in tags:
            kind = "skipped"
            marks = [p.get("value") for p in case.iter("property") if p.get("name") == "mark"]
            if "gpu" not in marks:
                unexpected.append(f"{case.get('classname')}::{case.get('name')}")
        kinds[kind] += 1
    return kinds, unexpected


def main() -> int:
    total: Counter[str] = Counter()
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (environment, marks) in RUNS.items():
            report = Path(folder) / f"{name}.xml"
            print(f"== tests of the {name} environment", flush=True)
            code = run(environment, marks, report)
            # A run that broke off without a report failed, whatever it had counted.
            kinds, skipped = count(report) if report.exists() else (Counter(failed=1), [])
            total += kinds
            if code or not kinds["passed"]:
                problems.append(f"{name}: pytest exited {code} with {kinds['passed']} passed")
            problems += [f"{name}: skipped {test}" for test in skipped]
    for problem in problems:
        print(problem)
    if problems and not total["failed"]:
        total["failed"] = 1
    counts = ", ".join(f"{total[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
    print(counts, flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
