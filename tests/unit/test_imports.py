"""The pure modules import the standard library, numpy, msgspec and each other: nothing else."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PURE = ("errors", "credit_batch", "scores", "credit", "outcome", "rollout")
ALLOWED = {"numpy", "msgspec", *(f"turnwise.{name}" for name in PURE)}


def imported(source: str) -> set[str]:
    """Modules imported anywhere in a file, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or ".")
    return names


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_needs_no_more_than_numpy_and_msgspec(name: str) -> None:
    modules = imported((ROOT / "turnwise" / f"{name}.py").read_text())

    foreign = {
        module
        for module in modules
        if module not in ALLOWED
        and module.partition(".")[0] not in sys.stdlib_module_names | {"numpy", "msgspec"}
    }
    assert foreign == set()
    assert modules


def test_what_is_imported_is_seen_wherever_it_stands() -> None:
    source = "import json\ndef f():\n    from redis.client import Redis\n    import torch.nn\n"

    assert imported(source) == {"json", "redis.client", "torch.nn"}
