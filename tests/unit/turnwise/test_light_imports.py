"""The SDK stays light: what it imports, and what `pip install .` brings along."""

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import turnwise

ROOT = Path(__file__).parents[3]
HEAVY = {"torch", "transformers", "vllm", "faiss", "faiss-cpu", "safetensors", "sklearn", "ray"}
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(turnwise.__path__, "turnwise.")
    if not module.name.endswith("__main__")
)
IMPORT_ALL = (
    f"import sys; [__import__(name) for name in {MODULES}];"
    f"print(*sorted({HEAVY} & set(sys.modules)), 'loaded')"
)


def test_the_list_of_modules_is_the_whole_library() -> None:
    assert {"turnwise.rollout", "turnwise.settings", "turnwise.v1.reward_pb2_grpc"} < set(MODULES)


def test_importing_every_module_loads_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=True
    )
    assert done.stdout == "loaded\n"


@pytest.mark.slow
def test_pip_install_brings_the_light_sdk_only(tmp_path: Path) -> None:
    scripts = tmp_path / "venv" / "bin"
    python = str(scripts / "python")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    subprocess.run(
        [python, "-m", "pip", "install", "-q", str(ROOT)], capture_output=True, check=True
    )

    command = [python, "-m", "pip", "list", "--format", "json"]
    listed = subprocess.run(command, capture_output=True, check=True, cwd=tmp_path)
    names = {entry["name"].lower() for entry in json.loads(listed.stdout)}
    print("pip install . brought", *sorted(names - {"pip", "setuptools"}))
    assert {"turnwise", "numpy", "grpcio"} < names
    assert not names & (HEAVY | {"fastapi", "uvicorn", "redis", "tensorboard", "pandas"})

    done = subprocess.run(
        [python, "-c", IMPORT_ALL], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout == "loaded\n"
    version = [str(scripts / "turnwise"), "version"]
    done = subprocess.run(version, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == f"turnwise {turnwise.__version__}\n"
