"""Checkpoints of the hub, looked at through their headers; the hub is a folder here."""

import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from emu3.checkpoints import NANO
from emu3.checkpoints.inspect import inspect
from emu3.checkpoints.outline import outline


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for the hub. Reads of whole weights are refused."""

    class Hub(DirFileSystem):
        def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
            assert end is not None or not path.endswith(".safetensors")
            return super().cat_file(path, start, end)

    folder = tmp_path / "hub"
    shutil.copytree(NANO, folder / "owner" / "nano")
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: Hub(folder, LocalFileSystem()))
    monkeypatch.chdir(tmp_path)
    return folder


def test_the_headers_say_what_the_whole_says(hub: Path) -> None:
    whole = hub / "owner" / "nano"
    with outline("owner/nano", download=True) as folder:
        assert inspect(folder) == replace(inspect(whole), path=str(folder))
        weights = folder / "model.safetensors"
        assert weights.stat().st_size == (whole / "model.safetensors").stat().st_size
        assert weights.stat().st_blocks * 512 < 200_000
    assert not folder.exists()


def test_a_folder_is_looked_at_in_place(hub: Path) -> None:
    with outline("hub/owner/nano", download=True) as folder:
        assert folder == Path("hub/owner/nano")
    with outline("nano") as folder:
        assert folder == NANO


def test_what_the_hub_does_not_have(hub: Path) -> None:
    with pytest.raises(ValueError, match="no model 'owner/other'"), outline("owner/other", download=True):
        pass


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        def find(self, *arguments: object, **options: object) -> None:
            raise ConnectionError("timed out")

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Silent)
    with pytest.raises(ValueError, match="'owner/nano': timed out"), outline("owner/nano", download=True):
        pass
