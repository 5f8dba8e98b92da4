"""Writes derived files: whole or not at all, under names made from their content."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from glm_core.errors import DataError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # each process then makes the file


def digest(parts: Iterable[str | bytes]) -> str:
    """Returns the sha256 (hex) of the parts, each hashed with its length, so that ("ab", "c") and
    ("a", "bc") differ."""
    total = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        total.update(len(raw).to_bytes(8, "little") + raw)
    return total.hexdigest()


def once(path: Path, make: Callable[[], bytes]) -> None:
    """Writes what `make` returns unless `path` exists. Of several processes one makes it, and the
    others wait; where the system has no file locks, each makes the same."""
    if path.exists():
        return
    with guarded(path), path.with_name(".lock").open("wb") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            write(path, make())


def write(path: Path, content: bytes) -> None:
    """Writes atomically: after a kill or on a full disk there is no partial file under that
    name."""
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
    """Creates the folder of `path`, and turns failures of the file system in the block into a
    DataError with the reason."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "free space or choose another cache folder"
        raise DataError(f"{path}: cannot be written ({reason}); {advice}") from None
