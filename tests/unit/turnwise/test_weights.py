"""The directory side of the weights contract: all or nothing, and nothing but what was listed."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from turnwise.errors import InvalidInput, TurnwiseError
from turnwise.weights import (
    Announcement,
    locate,
    policy_key,
    prune,
    publish,
    published_versions,
    verify,
    version_path,
)

WEIGHTS, CONFIG = b"weights of one", b'{"layers": 2}'


def write_checkpoint(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(WEIGHTS)
    (directory / "config.json").write_bytes(CONFIG)
    (directory / "templates").mkdir()
    (directory / "templates" / "chat.jinja").write_bytes(b"")


def published(root: Path, version: int = 1) -> tuple[Path, Announcement]:
    announcement = publish(root, "demo", version, write_checkpoint)
    return root / announcement.path, announcement


def rewrite_manifest(directory: Path, change: Callable[[dict[str, dict[str, int]]], object]) -> str:
    manifest = json.loads((directory / "manifest.json").read_bytes())
    change(manifest["files"])
    data = json.dumps(manifest).encode()
    (directory / "manifest.json").write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def test_a_published_version_holds_the_files_and_a_manifest_of_them(tmp_path: Path) -> None:
    announcement = publish(tmp_path, "demo", 42, write_checkpoint)

    assert announcement.path == "demo/v00000042"
    data = (tmp_path / "demo/v00000042/manifest.json").read_bytes()
    assert announcement.manifest_sha256 == hashlib.sha256(data).hexdigest()
    assert json.loads(data) == {
        "run": "demo",
        "version": 42,
        "files": {
            "config.json": {"size": 13, "sha256": hashlib.sha256(CONFIG).hexdigest()},
            "model.safetensors": {"size": 14, "sha256": hashlib.sha256(WEIGHTS).hexdigest()},
            "templates/chat.jinja": {
                "size": 0,
                "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            },
        },
    }
    verify(tmp_path / announcement.path, announcement.manifest_sha256)


def test_the_version_is_nowhere_to_be_seen_before_it_is_complete(tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        write_checkpoint(directory)
        assert published_versions(tmp_path, "demo") == []
        assert not (tmp_path / "demo/v00000001").exists()

    publish(tmp_path, "demo", 1, write)
    assert published_versions(tmp_path, "demo") == [1]


def test_the_same_content_may_be_published_again(tmp_path: Path) -> None:
    directory, first = published(tmp_path)
    before = directory.stat().st_ino

    assert publish(tmp_path, "demo", 1, write_checkpoint) == first
    assert directory.stat().st_ino == before
    assert sorted(os.listdir(tmp_path / "demo")) == [".lock", "v00000001"]


def test_other_content_under_a_published_version_is_refused(tmp_path: Path) -> None:
    directory, first = published(tmp_path)

    def write(other: Path) -> None:
        (other / "model.safetensors").write_bytes(b"other")

    with pytest.raises(InvalidInput, match=r"v00000001: is there already and differs"):
        publish(tmp_path, "demo", 1, write)
    verify(directory, first.manifest_sha256)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "a.pkl", "modeling.py", "weights"])
def test_only_safe_formats_are_published(tmp_path: Path, name: str) -> None:
    def write(directory: Path) -> None:
        write_checkpoint(directory)
        (directory / name).write_bytes(b"")

    with pytest.raises(InvalidInput, match=rf"/{name}: is not in a safe format; allowed are"):
        publish(tmp_path, "demo", 1, write)
    assert os.listdir(tmp_path / "demo") == [".lock"]


def test_a_version_without_weights_or_with_a_manifest_of_its_own_is_refused(tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        (directory / "manifest.json").write_text("{}")

    with pytest.raises(InvalidInput, match=r"demo/v00000001: holds no \.safetensors file"):
        publish(tmp_path, "demo", 1, lambda directory: None)
    with pytest.raises(InvalidInput, match=r"manifest\.json: is written by publish"):
        publish(tmp_path, "demo", 1, write)


@pytest.mark.parametrize(
    ("run", "version", "place"),
    [
        ("../x", 1, "run"),
        ("", 1, "run"),
        (".x", 1, "run"),
        ("a/b", 1, "run"),
        ("a:b", 1, "run"),
        ("a" * 101, 1, "run"),
        ("a", -1, "version"),
        ("a", 100_000_000, "version"),
    ],
)
def test_names_that_lead_elsewhere_are_refused(
    tmp_path: Path, run: str, version: int, place: str
) -> None:
    with pytest.raises(InvalidInput, match=f"^{place}: must be"):
        publish(tmp_path, run, version, write_checkpoint)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        write_checkpoint(directory)
        Path("/dev/full").write_bytes(b"x")  # a real ENOSPC

    with pytest.raises(TurnwiseError, match=r"v00000001: cannot be published: No space left"):
        publish(tmp_path, "demo", 1, write)
    assert os.listdir(tmp_path / "demo") == [".lock"]


def test_the_rest_of_a_killed_publisher_is_removed_by_the_next(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from turnwise.weights import publish\n"
        "def write(directory):\n"
        "    (directory / 'model.safetensors').write_bytes(b'half')\n"
        f"    os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "publish(Path(sys.argv[1]), 'demo', 1, write)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(os.listdir(tmp_path / "demo")) == [".lock", ".v00000001.tmp"]
    assert published_versions(tmp_path, "demo") == []

    published(tmp_path, 2)
    assert sorted(os.listdir(tmp_path / "demo")) == [".lock", "v00000002"]


def test_a_second_publisher_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    started, go_on = threading.Event(), threading.Event()

    def write(directory: Path) -> None:
        started.set()
        assert go_on.wait(10)
        write_checkpoint(directory)

    first = threading.Thread(target=publish, args=(tmp_path, "demo", 1, write))
    first.start()
    assert started.wait(10)
    with pytest.raises(TurnwiseError, match="another process is publishing there"):
        published(tmp_path, 2)
    go_on.set()
    first.join()

    assert published_versions(tmp_path, "demo") == [1]
    verify(tmp_path / "demo/v00000001")


def cut(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(WEIGHTS[:-1])


def edit(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"Weights of one")


def remove(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def add(directory: Path) -> None:
    (directory / "extra.json").write_text("{}")


def link(directory: Path) -> None:
    (directory / "config.json").rename(directory.parent / "config.json")
    (directory / "config.json").symlink_to(directory.parent / "config.json")


def link_folder(directory: Path) -> None:
    (directory / "templates" / "more").symlink_to(directory.parent)


def pipe(directory: Path) -> None:
    os.mkfifo(directory / "pipe.json")


def forget_manifest(directory: Path) -> None:
    (directory / "manifest.json").unlink()


def garble_manifest(directory: Path) -> None:
    (directory / "manifest.json").write_bytes(b'{"run": "\xff"')


def nest_manifest(directory: Path) -> None:
    (directory / "manifest.json").write_bytes(b'{"x":' + b"[" * 100_000)


def list_outside(directory: Path) -> None:
    rewrite_manifest(directory, lambda files: files.update({"../secret.json": {}, **files}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"/model\.safetensors: has 13 bytes, its manifest says 14$"),
        (edit, r"/model\.safetensors: sha256 is [0-9a-f]{64}, its manifest says [0-9a-f]{64}$"),
        (remove, r"/model\.safetensors: is missing$"),
        (add, r"/extra\.json: is not in the manifest$"),
        (link, r"/config\.json: is a link or no file at all$"),
        (link_folder, r"/templates/more: is a link or no file at all$"),
        (pipe, r"/pipe\.json: is a link or no file at all$"),
        (forget_manifest, r"/manifest\.json: is missing$"),
        (garble_manifest, r"/manifest\.json: is no manifest: "),
        (nest_manifest, r"/manifest\.json: is no manifest: "),
        (list_outside, r"/manifest\.json: is no manifest: Object missing required field"),
    ],
)
def test_verify_names_the_file_and_what_differs(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    directory, _ = published(tmp_path)
    verify(directory)

    damage(directory)
    with pytest.raises(InvalidInput, match=message):
        verify(directory)


@pytest.mark.parametrize("name", ["../secret.json", "/etc/secret.json", "templates/../../x.json"])
def test_a_manifest_cannot_name_a_file_outside_its_directory(tmp_path: Path, name: str) -> None:
    directory, _ = published(tmp_path)
    rewrite_manifest(directory, lambda files: files.update({name: files["config.json"]}))

    with pytest.raises(InvalidInput, match=rf"lists '{name}', outside the directory"):
        verify(directory)


def test_a_consistent_forgery_does_not_have_the_announced_hash(tmp_path: Path) -> None:
    directory, announcement = published(tmp_path)
    (directory / "config.json").unlink()
    forged = rewrite_manifest(directory, lambda files: files.pop("config.json"))

    verify(directory, forged)
    with pytest.raises(InvalidInput, match=f"sha256 is {forged}, announced was"):
        verify(directory, announcement.manifest_sha256)


def test_verify_refuses_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"/none: No such file or directory"):
        verify(tmp_path / "none")


@pytest.mark.parametrize("path", ["..", "", ".", "/etc", "demo/../../x", "a\0b", "x" * 5000])
def test_paths_that_leave_the_weights_root_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(InvalidInput):
        verify(locate(tmp_path / "weights", path))


def test_a_link_that_leaves_the_weights_root_is_refused(tmp_path: Path) -> None:
    outside, _ = published(tmp_path / "elsewhere")
    root = tmp_path / "weights"
    (root / "demo").mkdir(parents=True)
    (root / "demo" / "v00000001").symlink_to(outside)

    with pytest.raises(InvalidInput, match="'demo/v00000001': does not lie below"):
        locate(root, "demo/v00000001")


def test_the_weights_root_itself_may_be_a_link(tmp_path: Path) -> None:
    directory, announcement = published(tmp_path / "disk")
    (tmp_path / "weights").symlink_to(tmp_path / "disk")

    assert locate(tmp_path / "weights", announcement.path) == directory


def test_retention_keeps_the_newest_what_is_in_use_and_what_is_announced(tmp_path: Path) -> None:
    for version in range(1, 8):
        published(tmp_path, version)

    prune(tmp_path, "demo", announced=6, keep=2, in_use=[2])
    assert published_versions(tmp_path, "demo") == [2, 6, 7]
    prune(tmp_path, "demo", announced=6, keep=1)
    assert published_versions(tmp_path, "demo") == [6, 7]
    assert sorted(os.listdir(tmp_path / "demo")) == [".lock", "v00000006", "v00000007"]


def test_retention_never_removes_the_announced_version_or_one_after_it(tmp_path: Path) -> None:
    for version in range(1, 5):
        published(tmp_path, version)

    prune(tmp_path, "demo", announced=1, keep=1)
    assert published_versions(tmp_path, "demo") == [1, 2, 3, 4]
    with pytest.raises(InvalidInput, match="keep: must be at least 1, got 0"):
        prune(tmp_path, "demo", announced=4, keep=0)


def test_names_of_key_and_path_are_those_of_the_design() -> None:
    assert policy_key("demo") == "turnwise:demo:policy"
    assert version_path("demo", 42) == "demo/v00000042"
