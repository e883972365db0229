"""Tests marked `gpu` are skipped where there is no CUDA device."""

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch  # only now: most runs contain no such test

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
