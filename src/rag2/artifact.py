"""The one commit primitive: a directory of files -> a directory that is whole or not there at all.

Checkpoints, index generations and exports are written through `committing`. Order is everything:
files, their fsync, the manifest (size and SHA-256 of every file), the rename, and only then the
pointer; so a crash at any point leaves the previous artifact in force. Readers call `verify`
before any parser sees a byte. Files are safetensors, JSON or text, never pickle.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rag2.registry import UserError

FORMAT = 1
MANIFEST = "manifest.json"
KEYS = {"format", "kind", "files", "meta"}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, quota or file size left
LARGEST_MANIFEST = 64 << 20  # bytes; a larger one is no manifest of ours


class ArtifactError(UserError):
    """An artifact that is damaged, incomplete, of another kind, or already there."""


@contextmanager
def committing(
    directory: Path | str,
    kind: str,
    meta: dict[str, Any] | None = None,
    pointer: Path | str | None = None,
    replacing: bool = False,
) -> Iterator[Path]:
    """Yield a staging directory to write into; on leaving, commit it durably as `directory`.

    `meta` (parents, fingerprints; JSON values) goes into the manifest and may be filled inside the
    block. `pointer`, a text file in a parent folder of `directory`, names it once all is durable.
    With `replacing`, one that exists makes way for it then, and not before. Raises ArtifactError if
    `directory` exists otherwise, OSError naming it if there is no space left; on any exception
    nothing is left behind.
    """
    directory = Path(directory).absolute()
    if pointer is not None:
        pointer = Path(pointer).absolute()
        assert directory.is_relative_to(pointer.parent), f"{pointer} cannot name {directory}"
    if not replacing:
        _refuse_existing(directory)
    make_folders(directory.parent)
    staging, lock = _stage(directory)
    try:
        yield staging
        _write_manifest(staging, kind, {} if meta is None else meta)
        if replacing:
            remove(directory)
        _refuse_existing(directory)  # os.rename would replace an empty directory in silence
        try:
            os.rename(staging, directory)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                _refuse_existing(directory)
            raise
        _sync_directory(directory.parent)
    except BaseException as error:  # KeyboardInterrupt and SystemExit leave nothing behind either
        shutil.rmtree(staging, ignore_errors=True)
        for full in FULL:  # safetensors and FAISS say it with errors of their own
            if os.strerror(full) in str(error):
                raise OSError(full, os.strerror(full), str(directory)) from error
        raise
    finally:
        os.close(lock)
    if pointer is not None:
        replace(pointer, f"{directory.relative_to(pointer.parent)}\n")


def verify(
    directory: Path | str, kind: str | None = None, only: str | None = None
) -> dict[str, Any]:
    """The manifest of a directory whose every file was re-hashed and matched.

    Of a file `only` that alone is hashed; the sizes of all are compared. Raises ArtifactError, one
    line, for a damaged manifest, an unknown format, another kind than `kind`, and a changed,
    missing, unlisted or irregular (symlink, device) file.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    if kind is not None and manifest["kind"] != kind:
        raise ArtifactError(f"{directory} is a {manifest['kind']!r} artifact, not a {kind!r}")
    listed: dict[str, dict[str, Any]] = manifest["files"]
    found = _files(directory)
    for name in sorted(listed.keys() - found.keys()):
        raise ArtifactError(f"{directory} is damaged: file {name!r} is missing")
    for name in sorted(found.keys() - listed.keys()):
        raise ArtifactError(f"{directory} is damaged: file {name!r} is not in its manifest")
    for name, path in found.items():
        size = path.stat().st_size
        if size != listed[name]["bytes"]:
            change = f"{size} bytes instead of {listed[name]['bytes']}"
            raise ArtifactError(f"{directory} is damaged: file {name!r} has {change}")
        if only in (None, name) and _digest(path) != listed[name]["sha256"]:
            raise ArtifactError(f"{directory} is damaged: the bytes of file {name!r} have changed")
    return manifest


def seal(manifest: dict[str, Any]) -> str:
    """SHA-256 of what `verify` returned, the `seal` in its file: it stands for every byte."""
    text = json.dumps(manifest, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def is_complete(directory: Path | str) -> bool:
    """Whether the directory was committed; it says nothing about its bytes (see `verify`)."""
    return (Path(directory) / MANIFEST).is_file()


def follow(pointer: Path | str) -> Path | None:
    """The directory a pointer file names, or None if there is no pointer yet.

    Raises ArtifactError if the pointer is malformed or its directory is gone.
    """
    pointer = Path(pointer)
    try:
        name = pointer.read_text(encoding="utf-8").removesuffix("\n")
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, IsADirectoryError):
        raise ArtifactError(f"{pointer} is not a pointer file") from None
    parts = name.split("/")
    if not name.isprintable() or any(part in ("", ".", "..") for part in parts):
        raise ArtifactError(f"{pointer} does not name a directory beside it: {name[:60]!r}")
    if not is_complete(pointer.parent / name):
        raise ArtifactError(f"{pointer} names {name!r}, which is not a complete artifact")
    return pointer.parent / name


def replace(path: Path, text: str) -> None:
    """Write a small file in one atomic, durable step: a reader finds the old text or the new."""
    fresh = path.with_name(f".{path.name}.new-{os.getpid()}")
    try:
        _write_durably(fresh, text.encode())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def append(path: Path, text: str) -> None:
    """Add to a file, durable on return; a crash may leave the beginning of `text`."""
    new = not path.exists()
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if new:
        _sync_directory(path.parent)


@contextmanager
def staged(file: Path) -> Iterator[Path]:
    """Yield a path of that name on the same disk, to write there and rename; what stays there goes.

    What killed writers of `file` left behind goes first.
    """
    sweep(file.parent, file.name)
    staging, lock = _stage(file.absolute())
    try:
        yield staging / file.name
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def sweep(parent: Path | str, name: str = "") -> list[Path]:
    """Remove the staging directories that killed writers left in `parent`; returns them.

    Those of `name` alone, if it is given.
    """
    removed = []
    for staging in sorted(Path(parent).glob(f".{glob.escape(name) or '*'}.staging-*")):
        if staging.is_symlink() or not staging.is_dir():
            continue
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(staging)
            removed.append(staging)
        except BlockingIOError:
            continue  # its writer is alive
        finally:
            os.close(lock)
    return removed


def remove(directory: Path | str) -> None:
    """Remove a committed directory, or what is left of one; half of it never counts as complete."""
    (Path(directory) / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def _refuse_existing(directory: Path) -> None:
    """Committed directories are immutable, so there is nothing to overwrite."""
    if os.path.lexists(directory):
        raise ArtifactError(f"{directory} exists already; artifacts are never overwritten")


def make_folders(folder: Path) -> None:
    """Create the missing ones of a path of folders, each durable in its parent.

    Before anything is promised inside: without it a power loss may take the folder, and all in it.
    """
    if not folder.is_dir():
        make_folders(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_directory(folder.parent)


def _stage(directory: Path) -> tuple[Path, int]:
    """A fresh staging directory beside `directory` and the lock that shows its writer lives."""
    while True:
        staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}.staging-", dir=directory.parent))
        staging.chmod(0o755)  # mkdtemp's 0700 would follow the rename
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel frees it when the process dies
        if staging.exists():
            return staging, lock
        os.close(lock)  # a sweep came between creation and lock


def _write_manifest(staging: Path, kind: str, meta: dict[str, Any]) -> None:
    """Make every file and folder durable, then the manifest that vouches for them."""
    files = _files(staging)
    listed = {}
    for name, path in files.items():
        _sync_file(path)
        listed[name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    for folder in sorted({path.parent for path in files.values()} - {staging}, reverse=True):
        _sync_directory(folder)
    _sync_directory(staging)
    body = {"format": FORMAT, "kind": kind, "files": listed, "meta": meta}
    _write_durably(staging / MANIFEST, _sealed(body))
    _sync_directory(staging)


def _read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, itself checked byte for byte."""
    path = directory / MANIFEST
    if not directory.is_dir():
        raise ArtifactError(f"{directory} is not a directory")
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"{directory} is not a complete artifact: it has no {MANIFEST}")
    if path.stat().st_size > LARGEST_MANIFEST:
        raise ArtifactError(f"{path} is larger than {LARGEST_MANIFEST} bytes")
    data = path.read_bytes()
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise ArtifactError(f"{path} is damaged: not JSON") from None
    if not isinstance(body, dict):
        raise ArtifactError(f"{path} is damaged: not an object")
    if body.get("format") != FORMAT:
        shown = str(body.get("format"))[:20]
        raise ArtifactError(f"{path} has format {shown!r}; this version reads {FORMAT}")
    body.pop("seal", None)
    if body.keys() != KEYS or _sealed(body) != data:
        raise ArtifactError(f"{path} is damaged: its seal does not match")
    return body


def _sealed(body: dict[str, Any]) -> bytes:
    """The manifest file: canonical JSON with a SHA-256 over itself, so each byte is covered."""
    whole = {**body, "seal": seal(body)}
    text = json.dumps(whole, sort_keys=True, indent=1, allow_nan=False)
    return text.encode() + b"\n"


def _files(directory: Path) -> dict[str, Path]:
    """Relative name -> path of every regular file but the manifest; refuses anything else."""
    found: dict[str, Path] = {}
    for folder, folders, files in os.walk(directory):
        for path in (Path(folder, entry) for entry in (*folders, *files)):
            name = path.relative_to(directory).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                found[name] = path
            elif not stat.S_ISDIR(mode):
                raise ArtifactError(f"{directory} holds {name!r}, which is no regular file")
    found.pop(MANIFEST, None)
    return dict(sorted(found.items()))


def _digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, data: bytes) -> None:
    """Write and fsync a file."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_file(path: Path) -> None:
    """fsync a file somebody else wrote; any descriptor of it will do."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    """fsync a directory, which makes its entries (created, renamed) durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
