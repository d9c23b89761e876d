"""A checkpoint to look at, not to load: from the hub come settings and the headers of the weights, a few megabytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from emu3.checkpoints import is_hub_id, resolve


@contextmanager
def outline(name: str, download: bool = False) -> Iterator[Path]:
    """The folder of a checkpoint for as long as the context lasts.

    Args:
        name: as of `resolve`.
        download: whether to ask the hub about a hub id. The folder then holds safetensors files of their true size
            with nothing but their headers in them.

    Raises:
        ValueError: as of `resolve`, or the hub has no such repository or cannot be reached.
    """
    if not download or not is_hub_id(name):
        yield resolve(name)
        return
    with TemporaryDirectory() as folder:
        _fetch(name, Path(folder))
        yield Path(folder)


def _fetch(name: str, folder: Path) -> None:
    from huggingface_hub import HfFileSystem
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfFileSystem()
    try:
        found = cast(dict[str, Any], hub.find(name, detail=True))
        if not found:
            raise FileNotFoundError
        for path, entry in found.items():
            file = folder / path.removeprefix(f"{name}/")
            size = int(entry["size"])
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix != ".safetensors":
                # Of other files `inspect` reads the settings, and of the rest where they are and how large.
                file.write_bytes(hub.cat_file(path) if file.suffix == ".json" and size < 10**7 else b"")
            else:
                # 8 bytes length n | n bytes header | tensors: a hole here, which takes no room.
                length = hub.cat_file(path, start=0, end=8)
                file.write_bytes(length + hub.cat_file(path, start=8, end=8 + int.from_bytes(length, "little")))
            with file.open("r+b") as stream:
                stream.truncate(size)
    except FileNotFoundError as error:
        raise ValueError(f"the hub has no model {name!r} that is open to you") from error
    except HfHubHTTPError as error:
        raise ValueError(f"the hub refused {name!r}: {error}") from error
    except Exception as error:  # which class says so depends on the HTTP library, which the hub's client has changed
        raise ValueError(f"cannot reach the hub for {name!r}: {error}") from error
