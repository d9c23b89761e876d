"""Checkpoints by name: the shipped one, a folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

NANO = Path(__file__).parent.parent / "assets" / "nano"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.tiktoken"]


def resolve(name: str | Path, download: bool = False) -> Path:
    """The folder of a checkpoint, or of an adapter.

    Args:
        name: "nano" (shipped with the package), a folder, or a hub id `owner/name`.
        download: whether to fetch a hub id that is not in the hub's local cache, and for an adapter its base.

    Raises:
        ValueError: `name` is none of these, or a hub id that cannot be had.
    """
    if str(name) == "nano":
        return NANO
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _with_base(folder) if download else folder
    if folder.exists():
        raise ValueError(f"{str(name)!r} is a file; a checkpoint is the folder that holds config.json")
    if isinstance(name, str) and is_hub_id(name):
        folder = _from_hub(name, download)
        return _with_base(folder) if download else folder
    raise ValueError(f"unknown checkpoint {str(name)!r}: give 'nano', an existing folder, or a hub id 'owner/name'")


def _with_base(folder: Path) -> Path:
    """The same folder, once the base is there too if it is that of an adapter."""
    from emu3.checkpoints.adapters import base_of, is_adapter  # which asks this module for the base

    if is_adapter(folder):
        base_of(folder, download=True)
    return folder


def is_hub_id(name: str) -> bool:
    """Whether a name means a repository of the hub: it has the form `owner/name`, and is no folder here."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).expanduser().exists()


def _from_hub(name: str, download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=not download))
    except LocalEntryNotFoundError as error:
        if download:
            raise ValueError(f"cannot reach the hub for {name!r}, which is not in the cache; try again") from error
        raise ValueError(
            f"{name!r} is no folder here and not in the local cache of the hub; "
            f"fetch it with `emu3 pull {name}`, or in Python with `download=True`"
        ) from error
    except HfHubHTTPError as error:
        raise ValueError(f"the hub refused {name!r}: {error}") from error
