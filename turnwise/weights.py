"""Publish and watch policy versions: a directory of weights and one Redis key.

`root/<run>/v00000042/` holds weights, config, tokenizer and `manifest.json`, which lists every
file with size and sha256. It appears by one rename, complete and on disk; then the key
`turnwise:<run>:policy` moves to it, forward only. Old versions leave by rename as well.
"""

import asyncio
import fcntl
import hashlib
import logging
import os
import random
import re
import shutil
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from turnwise.errors import InvalidInput, TurnwiseError

if TYPE_CHECKING:
    from redis import Redis

MANIFEST = "manifest.json"
# Weights, config and index, tokenizer, chat template. A pickle runs code when it is loaded.
SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")
MAX_MANIFEST_BYTES = 2**24
MAX_VERSION = 99_999_999  # eight digits, so that a listing is in order
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.1, 5.0
REDIS_TIMEOUT_S = 5.0

Version = Annotated[int, Meta(ge=0, le=MAX_VERSION)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]

log = logging.getLogger(__name__)


class FileRecord(msgspec.Struct, frozen=True):
    size: int  # bytes
    sha256: Sha256


class Manifest(msgspec.Struct, frozen=True):
    run: str
    version: Version
    files: dict[str, FileRecord]  # by path relative to the directory, itself not included


class Announcement(msgspec.Struct, frozen=True):
    """What the Redis key says: the version now to be served, and how to know it is whole."""

    version: Version
    path: str  # relative to the weights root
    manifest_sha256: Sha256


def version_path(run: str, version: int) -> str:
    """Where a version lies below the weights root."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", run):
        raise InvalidInput("run", f"must be letters, digits and ._- (at most 100), got {run!r}")
    if not 0 <= version <= MAX_VERSION:
        raise InvalidInput("version", f"must be from 0 to {MAX_VERSION}, got {version}")
    return f"{run}/v{version:08}"


def policy_key(run: str) -> str:
    """The Redis key, and the channel of the same name that tells when it moved."""
    return f"turnwise:{run}:policy"


def fence_key(run: str) -> str:
    """The Redis key of the newest fencing token; a trainer's lease may raise it with INCR."""
    return f"turnwise:{run}:fence"


def publish(root: Path, run: str, version: int, write: Callable[[Path], None]) -> Announcement:
    """Let `write` fill a directory, and make it visible as a whole or not at all.

    Publishing the same content again changes nothing: a trainer that was killed before it
    announced a version repeats both. Other content under a published version is refused.
    """
    path = version_path(run, version)
    target = root / path
    temporary = _hidden(target)
    try:
        with _locked(target.parent):
            try:
                temporary.mkdir()
                write(temporary)
                manifest_sha256 = _seal(temporary, run, version)
                if target.exists():
                    _require_same(target, manifest_sha256)
                else:
                    temporary.rename(target)
                _fsync(target.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise TurnwiseError(f"{target}: cannot be published: {reason}") from error
    return Announcement(version, path, manifest_sha256)


def verify(directory: Path, manifest_sha256: str = "") -> Manifest:
    """Return the manifest of a directory that holds exactly what it lists, else InvalidInput."""
    place = str(directory)
    try:
        files = dict(_files(directory))
        place = f"{directory}/{MANIFEST}"
        if MANIFEST not in files:
            raise InvalidInput(place, "is missing")
        with files.pop(MANIFEST).open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES)  # what is cut off is no JSON
        if manifest_sha256 and (got := hashlib.sha256(data).hexdigest()) != manifest_sha256:
            raise InvalidInput(place, f"sha256 is {got}, announced was {manifest_sha256}")
        manifest = msgspec.json.decode(data, type=Manifest)
        _compare_names(directory, manifest.files, files)
        for name, record in manifest.files.items():
            place = f"{directory}/{name}"
            if (size := files[name].stat().st_size) != record.size:
                raise InvalidInput(place, f"has {size} bytes, its manifest says {record.size}")
            if (got := _sha256(files[name])) != record.sha256:
                raise InvalidInput(place, f"sha256 is {got}, its manifest says {record.sha256}")
    except (ValueError, RecursionError) as error:  # JSON, UTF-8, nesting, fields
        raise InvalidInput(place, f"is no manifest: {error}") from error
    except OSError as error:
        raise InvalidInput(str(error.filename or place), error.strerror or str(error)) from error
    return manifest


def locate(root: Path, path: str) -> Path:
    """The directory that `path` names below the weights root, where links may not lead out."""
    try:
        directory, top = Path(os.path.realpath(root / path)), Path(os.path.realpath(root))
    except ValueError as error:  # a NUL
        raise InvalidInput(repr(path), f"is no path: {error}") from error
    if top not in directory.parents:
        raise InvalidInput(repr(path), "does not lie below the weights root")
    return directory


def published_versions(root: Path, run: str) -> list[int]:
    """Every version there is, in order; after a rollback a trainer goes on after the last."""
    folder = (root / version_path(run, 0)).parent
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name[1:]) for name in names if re.fullmatch(r"v\d{8}", name))


def prune(root: Path, run: str, announced: int, keep: int, in_use: Collection[int] = ()) -> None:
    """Remove versions older than the announced one, but not the newest `keep` of all.

    `in_use` names others that stay: those that a checkpoint or a slow server needs.
    """
    if keep < 1:
        raise InvalidInput("keep", f"must be at least 1, got {keep}")
    versions = published_versions(root, run)
    removed = [v for v in versions[:-keep] if v < announced and v not in in_use]
    if removed:
        with _locked(root / run):
            for version in removed:
                path = root / version_path(run, version)
                shutil.rmtree(path.rename(_hidden(path)))


# One step for every reader: a fenced trainer cannot move the key, and no one moves it back.
MOVE_FORWARD = """
local fence = redis.call('GET', KEYS[2]) or '0'
if tonumber(ARGV[3]) < tonumber(fence) then return {'fenced', fence} end
local held = redis.call('GET', KEYS[1])
if held ~= ARGV[1] then
  if held and cjson.decode(held).version >= tonumber(ARGV[2]) then return {'refused', held} end
  redis.call('SET', KEYS[1], ARGV[1])
  redis.call('PUBLISH', KEYS[1], ARGV[1])
end
if tonumber(ARGV[3]) > tonumber(fence) then redis.call('SET', KEYS[2], ARGV[3]) end
return {'done', ''}
"""


def announce(client: "Redis", run: str, announcement: Announcement, fence: int = 0) -> None:
    """Move the policy key to a published version; announcing the same again changes nothing.

    Refuses a version that is not newer than the key's, and a fencing token that is older than
    the newest one seen (`fence_key`).
    """
    keys = policy_key(run), fence_key(run)
    value, version = msgspec.json.encode(announcement), announcement.version
    reply = client.eval(MOVE_FORWARD, 2, *keys, value, version, fence)
    status, held = (x.decode() if isinstance(x, bytes) else str(x) for x in reply)
    if status == "fenced":
        raise TurnwiseError(f"{keys[0]}: fencing token {fence} is older than the newest, {held}")
    if status == "refused":
        raise InvalidInput(keys[0], f"cannot move to version {version}, it holds {held}")


def announced(client: "Redis", run: str) -> Announcement | None:
    """What the policy key says now; None before the first announcement."""
    held = client.get(policy_key(run))
    return msgspec.json.decode(held, type=Announcement) if held else None


async def watch(
    redis_url: str, run: str, poll_s: float = 5.0
) -> AsyncGenerator[Announcement, None]:
    """Yield the newest announcement, then each newer one; those in between are skipped.

    A message says at once that the key moved; a look every `poll_s` seconds finds what a
    lost message did not say. Waits for a Redis that is away.
    """
    from redis.asyncio import Redis  # noqa: PLC0415  the SDK does without redis
    from redis.exceptions import RedisError  # noqa: PLC0415

    key, backoff_s = policy_key(run), FIRST_BACKOFF_S
    seen: bytes | str | None = None
    async with Redis.from_url(
        redis_url, socket_timeout=REDIS_TIMEOUT_S, socket_connect_timeout=REDIS_TIMEOUT_S
    ) as client:
        while True:
            try:
                async with client.pubsub() as messages:
                    await messages.subscribe(key)
                    while True:
                        held = await client.get(key)
                        backoff_s = FIRST_BACKOFF_S
                        if held and held != seen:
                            seen = held
                            if (announcement := _readable(held)) is not None:
                                yield announcement
                        await messages.get_message(timeout=poll_s)
            except (RedisError, OSError) as error:
                if backoff_s == FIRST_BACKOFF_S:  # one line per outage
                    log.warning("policy watch lost redis", extra={"reason": str(error)})
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311
            backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)


def _readable(held: bytes | str) -> Announcement | None:
    try:
        return msgspec.json.decode(held, type=Announcement)
    except (ValueError, RecursionError) as error:
        log.error("policy key is unreadable", extra={"reason": str(error)})
        return None


def _hidden(target: Path) -> Path:
    """Where a version is while it comes or goes; no reader looks at hidden names."""
    return target.with_name(f".{target.name}.tmp")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Change a run's folder alone, and rid it of what a killed process left half-way."""
    folder.mkdir(parents=True, exist_ok=True)
    _fsync(folder.parent)
    with (folder / ".lock").open("w") as lock:  # the kernel frees it when its holder dies
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TurnwiseError(f"{folder}: another process is publishing there") from None
        for leftover in folder.glob(".v*.tmp"):
            shutil.rmtree(leftover)
        yield


def _seal(directory: Path, run: str, version: int) -> str:
    """Write the manifest, bring everything to the disk, and return the manifest's sha256."""
    files = dict(sorted(_files(directory)))
    if MANIFEST in files:
        raise InvalidInput(MANIFEST, "is written by publish")
    if not any(name.endswith(".safetensors") for name in files):
        raise InvalidInput(version_path(run, version), "holds no .safetensors file")
    records = {n: FileRecord(path.stat().st_size, _sha256(path)) for n, path in files.items()}
    data = msgspec.json.format(msgspec.json.encode(Manifest(run, version, records)))
    (directory / MANIFEST).write_bytes(data)
    for folder, _, names in os.walk(directory):
        for name in (*names, "."):
            _fsync(Path(folder, name))
    return hashlib.sha256(data).hexdigest()


def _require_same(target: Path, manifest_sha256: str) -> None:
    try:
        verify(target, manifest_sha256)
    except InvalidInput as error:
        raise InvalidInput(str(target), f"is there already and differs ({error})") from error


def _files(directory: Path, prefix: str = "") -> Iterator[tuple[str, Path]]:
    """Every file by its name below the directory; links and unsafe formats are refused."""
    with os.scandir(directory) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path), f"{name}/")
            elif not entry.is_file(follow_symlinks=False):
                raise InvalidInput(entry.path, "is a link or no file at all")
            elif not name.endswith(SUFFIXES):
                allowed = ", ".join(SUFFIXES)
                raise InvalidInput(entry.path, f"is not in a safe format; allowed are {allowed}")
            else:
                yield name, Path(entry.path)


def _compare_names(directory: Path, listed: Collection[str], present: Collection[str]) -> None:
    for name in listed:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise InvalidInput(f"{directory}/{MANIFEST}", f"lists {name!r}, outside the directory")
        if name not in present:
            raise InvalidInput(f"{directory}/{name}", "is missing")
    for name in present:
        if name not in listed:
            raise InvalidInput(f"{directory}/{name}", "is not in the manifest")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
