"""Marks: `gpu` tests are skipped without a CUDA device, `vllm` tests live in tests/vllm alone."""

from pathlib import Path

import pytest

VLLM = Path(__file__).parent / "vllm"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a test that no environment would run; note the marks that the count asks for."""
    for item in items:
        marked = item.get_closest_marker("vllm") is not None
        if marked != item.path.is_relative_to(VLLM):
            raise pytest.UsageError(
                f"{item.nodeid}: tests marked vllm live in tests/vllm, all of it"
            )
        if item.get_closest_marker("gpu"):
            item.user_properties.append(("mark", "gpu"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch  # only now: most runs contain no such test

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
