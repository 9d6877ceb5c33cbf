"""Files that are whole or not there, that one process at a time makes, and digests of contents."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

log = logging.getLogger(__name__)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new file beside `path` to write to; it takes the place of `path` in one step when the block ends without an exception.

    A reader, also after a crash or power loss, finds the old file or the new one, never a part of one. The parent folder is made.

    >>> with replacing("weights.pt") as partial:
    ...     torch.save(state, partial)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def owned(path: str | Path) -> Iterator[None]:
    """While the block lasts no other process can enter one for the same file or folder `path`.

    The lock beside it, `.name.lock`, ends with the process, however that ends. A disk that knows no locks is warned of. Raises
    ValueError, which names the owner, when `path` is owned already.
    """
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with _locked(lock, what=path) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def _locked(lock: Path, *, what: Path) -> Iterator[TextIO]:
    while True:
        with lock.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                owner = file.read() or "another process"
                raise ValueError(f"{what} is being made by {owner}; wait for it, or choose another folder") from error
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                log.warning("%s: this disk has no locks (%s); let only one process write there", lock.parent, error.strerror)
            if _is_at(file, lock):  # else the owner before has just removed it
                yield file
                return


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text to `path` atomically (see `replacing`)."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON to `path` atomically (see `replacing`)."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises ValueError, which names the file, when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); remove it, and what it belongs to is made again") from error


def read_json_if_whole(path: Path) -> Any:
    """What a JSON file holds; None when it is missing or broken, so that what it describes counts as not made."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            found.update(part)
    return found.hexdigest()


def digest_of(content: object) -> str:
    """Short digest of anything that JSON can represent: the first 16 hexadecimal digits of SHA-256 over its sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def check_writable(folder: str | Path) -> None:
    """Raises ValueError unless files can be put into `folder`, which is created when it is missing."""
    folder = Path(folder)
    probe_file = folder / f".writable.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe_file.touch()
        probe_file.unlink()
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}; choose another --output") from error


def check_disk(folder: str | Path, needed: int) -> None:
    """Raises ValueError when the disk of `folder` has less than `needed` bytes left."""
    free = shutil.disk_usage(_existing(Path(folder).absolute())).free
    if free < needed:
        raise ValueError(
            f"{folder}: about {needed / 2**30:.2f} GiB of disk needed, {free / 2**30:.2f} GiB free; make room or choose another --output"
        )
