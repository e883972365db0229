"""Generate turnwise/v1 from proto/, or with --check say whether the committed stubs differ."""

import argparse
import filecmp
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

PROTO = "turnwise/v1/reward.proto"
STUBS = ("reward_pb2.py", "reward_pb2.pyi", "reward_pb2_grpc.py", "reward_pb2_grpc.pyi")


def generate(root: Path, out: Path) -> None:
    """Write the stubs of root/proto below `out`."""
    arguments = [
        "protoc",
        f"-I{root / 'proto'}",
        f"-I{Path(grpc_tools.__file__).parent / '_proto'}",
        f"--plugin=protoc-gen-mypy={Path(sys.executable).parent / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={Path(sys.executable).parent / 'protoc-gen-mypy_grpc'}",
        f"--python_out={out}",
        f"--mypy_out=quiet:{out}",
        f"--grpc_python_out={out}",
        f"--mypy_grpc_out=quiet:{out}",
        PROTO,
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit(f"protoc refused {PROTO}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    parser.add_argument("root", type=Path, help="the repository")
    args = parser.parse_args()
    if not args.check:
        generate(args.root, args.root)
        return
    with tempfile.TemporaryDirectory() as fresh:
        generate(args.root, Path(fresh))
        committed, made = args.root / "turnwise/v1", Path(fresh) / "turnwise/v1"
        _, differ, missing = filecmp.cmpfiles(made, committed, STUBS, shallow=False)
    if differ or missing:
        raise SystemExit(f"stale stubs in turnwise/v1: {differ + missing}; run `make proto`")


if __name__ == "__main__":
    main()
