"""Files that are whole or absent, and the user's version of what a disk refuses."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import platformdirs

from runners.errors import UserError
from runners.store.plain import to_plain

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space, quota used up, file larger than the limit of the process or the file system."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without file locks answers."""
LOCK = ".lock"


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Raises:
        UserError: disk full or not writable.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_json_atomic(path: Path, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically.

    Raises:
        ValueError: NaN, infinity or a type without a JSON form; the message names the key.
        UserError: disk full or not writable.
    """
    text = json.dumps(to_plain(obj, path.name), indent=2, allow_nan=False)
    write_bytes_atomic(path, f"{text}\n".encode())


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
    return _no_space(path) if _is_full(error) else error


def full_disk(path: Path, error: BaseException) -> UserError | None:
    """The user's version of an error that a full disk explains, itself or what it was raised from.

    Libraries wrap the system's error, and safetensors gives it as text.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if _is_full(link):
            return _no_space(getattr(link, "filename", None) or path)
        seen.add(id(link))
        link = link.__cause__ or link.__context__
    return None


def _no_space(path: Path) -> UserError:
    return UserError(f"no space left to write {path}: free some, or choose another folder")


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    return any(f"os error {number})" in str(error) for number in FULL)


def remove_partial(folder: Path, name: str = "") -> None:
    """Remove what writers that were killed have left; who calls this holds the folder's lock."""
    for path in [*folder.glob(f".{name}*"), *folder.glob(f"{name}*.tmp")]:
        if path.is_file() and path.name != LOCK:
            path.unlink(missing_ok=True)


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """`cache_dir`, else $ROUTEBENCH_CACHE_DIR, else the user's cache folder."""
    chosen = cache_dir or os.environ.get("ROUTEBENCH_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("routebench"))


def sha256_of(file: Path) -> str:
    """Hex digest of a file's content."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
