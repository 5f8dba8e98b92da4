"""How derived files reach the disk: whole or not at all, under names that say their content."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from glm_core.errors import DataError


def digest(parts: Iterable[str | bytes]) -> str:
    """sha256 (hex) of the parts, each with its length, so that ("ab", "c") and ("a", "bc")
    differ."""
    total = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        total.update(len(raw).to_bytes(8, "little") + raw)
    return total.hexdigest()


def once(path: Path, make: Callable[[], bytes]) -> None:
    """Writes what `make` returns unless `path` exists; of several processes one makes it, the
    others wait."""
    if path.exists():
        return
    with guarded(path), path.with_name(".lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            write(path, make())


def write(path: Path, content: bytes) -> None:
    """Writes atomically: a killed process or a full disk leaves no partial file under that name."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Makes the folder of `path`; a failure of the file system becomes a DataError with its
    reason."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "free space or choose another cache folder"
        raise DataError(f"{path}: cannot be written ({reason}); {advice}") from None
