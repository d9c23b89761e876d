"""Files that are there as a whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` write a file under another name first; its folder is made. ValueError where that cannot be done."""
    unfinished = path.with_name(f".{os.getpid()}.tmp")  # short: `path` may have the longest name allowed
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"cannot write {str(path)!r}: {why}; mend that, or name another place") from error


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left of files that they were writing, anywhere in a folder."""
    for file in folder.rglob(".*.tmp"):
        if file.name.removeprefix(".").removesuffix(".tmp").isdecimal():
            file.unlink(missing_ok=True)
