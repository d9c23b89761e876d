from pathlib import Path

import pytest

from emu3.checkpoints.convert import staged_folder


def test_the_folder_appears_when_all_is_written(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with staged_folder(target) as folder:
        assert folder.parent == target.parent and not target.exists()
        (folder / "part").mkdir()
        (folder / "part" / "file").write_text("whole")
    assert (target / "part" / "file").read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_cleaned(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "first") as folder:
        name = folder.name.replace("first", "target")
    (tmp_path / name / "part").mkdir(parents=True)
    (tmp_path / name / "part" / "stale").write_text("half")
    (tmp_path / name / "config.json").symlink_to(tmp_path / "first")
    with staged_folder(tmp_path / "target") as folder:
        assert folder.name == name
        assert list(folder.iterdir()) == []
    assert (tmp_path / "first").is_dir() and list((tmp_path / "target").iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_there_stays(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "folder":
        target.mkdir()
    else:
        target.touch()
    with pytest.raises(ValueError, match="is there already"), staged_folder(target):
        pass
    assert list(tmp_path.iterdir()) == [target]


def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("first")
        with pytest.raises(ValueError, match="another process is writing"), staged_folder(tmp_path / "target"):
            pass
        assert (folder / "file").read_text() == "first"
    assert (tmp_path / "target" / "file").read_text() == "first"
