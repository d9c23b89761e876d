"""A folder that appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` that is renamed to `target` when the block ends, and removed if it fails.

    A process that is killed leaves it behind under its temporary name; the next one for the same target empties it.

    Raises:
        ValueError: `target` exists, or another process is writing it.
    """
    if target.exists():
        raise ValueError(f"{target} is there already; remove it, or name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.with_name(f".{target.name}.unfinished")
    folder.mkdir(exist_ok=True)
    # The lock ends with the process that holds it, however that ends: a locked folder is in use, another one is stale.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder, target)
        try:
            _empty(folder)
            yield folder
            for file in [*folder.rglob("*"), folder]:
                _to_disk(file)
            folder.rename(target)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        _to_disk(target.parent)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between opening and locking, the process that held the lock may have finished and renamed the folder.
        ours = os.path.samestat(os.fstat(descriptor), folder.stat())
    except (BlockingIOError, FileNotFoundError):
        ours = False
    if not ours:
        raise ValueError(f"another process is writing {target}; wait for it, or name another folder")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
