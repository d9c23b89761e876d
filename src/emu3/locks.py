"""Locks on what one process of this machine writes at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Keep other processes out for a while, by a file that is removed in the end.

    The system releases the lock however its process ends. ValueError where the file cannot be made, and while another
    process has it, with `what` that one is writing.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(f"another process is writing {what}; wait for it, or name another folder") from None
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"cannot write {str(path)!r}: {why}; mend that, or name another folder") from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps an open file; releasing the lock removes it there
            os.unlink(lock.lock_file)
        lock.release()
