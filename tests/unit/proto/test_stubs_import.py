"""The committed stubs work under the oldest and the newest protobuf a user may have."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = """
import google.protobuf, sys
sys.path.insert(0, sys.argv[1])
import reward_pb2 as pb
reply = pb.RolloutScore(rollout_id="a", gains=[0.5])
print(google.protobuf.__version__, pb.RolloutScore.FromString(reply.SerializeToString()).gains[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["5.26.1", "6.33.6", "7.36.2"])
def test_the_messages_work_under_protobuf(version: str, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "--no-deps", "--target", tmp_path, f"protobuf=={version}"],
        check=True,
        capture_output=True,
    )

    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ROOT / "turnwise" / "v1"],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.split() == [version, "0.5"]
