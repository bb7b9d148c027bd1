"""Write files that are whole or absent, and read back only what was written.

What is read back (records, cached values, products and checkpoints of stages) holds the sha256 of
its own bytes, taken with zeros in the digest's place: damage at any byte is noticed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import platformdirs
from filelock import FileLock, Timeout

from runners.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, quota used up, file larger than the limit of the process or the file system."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without file locks answers."""
CHECKSUM = "content_sha256"
STAMP = re.compile(rf'"{CHECKSUM}": ?"([0-9a-f]{{64}})"'.encode())
BLANK = b"0" * 64


class Damaged(ValueError):
    """The file is not what was written; the message says why."""


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """`cache_dir`, else $ROUTEBENCH_CACHE_DIR, else the user's cache folder."""
    chosen = cache_dir or os.environ.get("ROUTEBENCH_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("routebench"))


def sha256_of(file: Path) -> str:
    """Hex digest of a file's content."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Raises:
        UserError: disk full or not writable.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise disk_error(path, error) from error


def remove_partial(path: Path) -> None:
    """Remove what killed writers of a file, or of a folder's files, have left."""
    folder, pattern = (path, "*.tmp") if path.is_dir() else (path.parent, f".{path.name}.*.tmp")
    for partial in folder.glob(pattern):
        partial.unlink(missing_ok=True)


def write_json_atomic(path: Path, obj: Any, *, checked: bool = False) -> None:
    """Write `obj` as indented JSON, atomically.

    Args:
        checked: `obj` is a dictionary that `read_checked` is to give back.

    Raises:
        ValueError: NaN, infinity or a type without a JSON form; the message names the key.
        UserError: disk full or not writable.
    """
    if checked:
        obj = {**obj, CHECKSUM: BLANK.decode()}
    data = f"{json.dumps(to_json(obj, path.name), indent=2)}\n".encode()
    write_bytes_atomic(path, _stamped(data) if checked else data)


def read_checked(path: Path) -> dict[str, Any]:
    """Read an object as it was written.

    Raises:
        FileNotFoundError: no such file.
        Damaged: unreadable, or another content than was written.
    """
    found: dict[str, Any] = json.loads(_checked(path))
    del found[CHECKSUM]
    return found


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors, and JSON values about them, as one safetensors file.

    Raises:
        UserError: disk full or not writable.
    """
    from safetensors.torch import save

    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"about": json.dumps(about), CHECKSUM: BLANK.decode()}
    write_bytes_atomic(path, _stamped(save(on_host, metadata)))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors, on the host, and what was written about them.

    Raises:
        FileNotFoundError: no such file.
        Damaged: unreadable, or another content than was written.
    """
    from safetensors.torch import load

    data = _checked(path)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return load(data), json.loads(header["__metadata__"]["about"])


def _stamped(data: bytes) -> bytes:
    return data.replace(BLANK, hashlib.sha256(data).hexdigest().encode(), 1)


def _checked(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Damaged(f"{path} is damaged ({error})") from error
    found = STAMP.search(data)
    if found is None or _stamped(data.replace(found[1], BLANK, 1)) != data:
        raise Damaged(f"{path} is damaged (its content is not what was written)")
    return data


def to_json(value: Any, where: str) -> Any:
    """Convert to JSON types; numpy and torch scalars become Python numbers.

    Raises:
        ValueError: NaN, infinity or a type without a JSON form; the message names the key.
    """
    if isinstance(value, Mapping):
        return {str(k): to_json(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}, which JSON cannot hold")
        return float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return to_json(value.item(), where)
    raise ValueError(f"{where} is a {type(value).__name__}, which JSON cannot hold")


@contextmanager
def locked(path: Path, waiting: str = "") -> Iterator[None]:
    """Hold a lock file; the folder around it is created.

    Args:
        waiting: logged if another process holds it.

    Raises:
        UserError: it cannot be written, or has no locks.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if waiting:
                log.info("%s", waiting)
            lock.acquire()
    except OSError as error:
        raise disk_error(path, error) from error
    try:
        yield
    finally:
        lock.release()


def disk_error(path: Path, error: OSError) -> OSError | UserError:
    """The user's version of an error that a full or read-only disk, or one without file locks,
    explains; else the error."""
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return UserError(f"cannot write {path} ({error.strerror}): choose another folder")
    if error.errno in NO_LOCKS:
        return UserError(
            f"cannot lock {path} ({error.strerror}): its file system has no file locks; give "
            "results_dir= and cache_dir= on one that has"
        )
    return full_disk(path, error) or error


def full_disk(path: Path, error: BaseException) -> UserError | None:
    """The user's version of an error that a full disk explains, itself or what it was raised from.

    Libraries wrap the system's error, and safetensors gives it as text.
    """
    link: BaseException | None = error
    while link is not None and not _is_full(link):
        link = link.__cause__ or link.__context__
    if link is None:
        return None
    place = getattr(link, "filename", None) or path
    return UserError(f"no space left to write {place}: free some, or choose another folder")


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    return any(f"os error {number})" in str(error) for number in FULL)


def content_hash(file: Path, cache_dir: Path) -> str:
    """Hash a file's content; it is read again only when its size or time of change is another.

    Returns:
        sha256, hex, kept in `<cache_dir>/hashes`.
    """
    status = file.stat()
    version = f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}"
    kept = cache_dir / "hashes" / hashlib.sha256(version.encode()).hexdigest()
    if not kept.is_file():
        write_bytes_atomic(kept, sha256_of(file).encode())
    return kept.read_text()
