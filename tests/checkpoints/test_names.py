from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from emu3.checkpoints import NANO, resolve


def test_nano_is_in_the_package() -> None:
    assert resolve("nano") == NANO
    assert NANO.parts[-3:] == ("emu3", "assets", "nano")


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve("owner/name") == Path("owner/name")


@pytest.mark.parametrize("name", ["nono", "a/b/c", "../elsewhere", "/no/such", "owner/", "a b/c"])
def test_an_unknown_name_lists_what_is_possible(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'nano', an existing folder, or a hub id 'owner/name'") as caught:
        resolve(name)
    assert repr(name) in str(caught.value)


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ValueError, match="is a file"):
        resolve(file)


@pytest.mark.parametrize(
    ("download", "remedy"), [(False, "emu3 pull BAAI/Emu3-Chat-hf"), (True, "cannot reach the hub")]
)
def test_a_hub_id_is_fetched_only_when_allowed(monkeypatch: pytest.MonkeyPatch, download: bool, remedy: str) -> None:
    calls: list[dict[str, Any]] = []

    def absent(name: str, **arguments: Any) -> str:
        calls.append(arguments)
        raise LocalEntryNotFoundError("absent")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(ValueError, match=remedy):
        resolve("BAAI/Emu3-Chat-hf", download=download)
    assert [call["local_files_only"] for call in calls] == [not download]
    assert not {"*.bin", "*.py"} & set(calls[0]["allow_patterns"])


def test_a_hub_id_in_the_local_cache_is_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / name))
    assert resolve("BAAI/Emu3-Chat-hf") == tmp_path / "BAAI/Emu3-Chat-hf"
