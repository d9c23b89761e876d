"""The files of the command line: where pictures are written to and read from."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emu3.suffixes import CLIPS
from emu3.whole import write_whole

if TYPE_CHECKING:
    from PIL import Image

    from emu3.clips import Clip


PICTURES = (".png",)


def write_picture(picture: Image.Image, path: Path, record: dict[str, Any]) -> None:
    """Write a PNG with `record` as JSON in its text chunk "emu3", wholly or not at all."""
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("emu3", json.dumps(record))
    write_whole(path, lambda unfinished: picture.save(unfinished, format="PNG", pnginfo=text))


def write_clip(clip: Clip, path: Path) -> None:
    """Write a clip in the format of the path's suffix, wholly or not at all."""
    write_whole(path, lambda unfinished: clip.save(unfinished, path.suffix))


def write_text(text: str, path: Path) -> None:
    """Write a text, wholly or not at all."""
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))


def output_paths(output: Path, count: int, suffixes: Sequence[str] = PICTURES) -> list[Path]:
    """Where pictures or clips go: out.png, or out-1.png, ...; in a folder 1.png, ... with the first of the suffixes.

    ValueError where none can be written.
    """
    what, first, known = "clips" if suffixes == CLIPS else "pictures", suffixes[0], ", ".join(suffixes)
    if output == Path() or output.name.lower() in (*suffixes, ".."):
        raise ValueError(f"{str(output)!r} names no file; give -o a name that ends in {known}, or a folder")
    if output.suffix and output.suffix.lower() not in suffixes and not _is_folder(output):
        raise ValueError(f"cannot write {str(output)!r}: {what} end in {known}; name such a file, or a folder")
    if _is_folder(output) or not output.suffix:
        paths = [output / f"{number}{first}" for number in range(1, count + 1)]
    elif count == 1:
        paths = [output]
    else:
        paths = [output.with_name(f"{output.stem}-{number}{output.suffix}") for number in range(1, count + 1)]
    for path in paths:
        if problem := _why_not_written(path):
            raise ValueError(f"cannot write {str(path)!r:.120}: {problem}; give -o another name")
    return paths


def check_folder(folder: Path, is_new: bool = False) -> None:
    """ValueError where no files can be written into a folder, or a new one is there already or could not be named."""
    if is_new and str(folder) == "nano":
        raise ValueError("nano means the shipped checkpoint; name another folder, such as my-nano")
    if is_new and folder.exists():
        raise ValueError(f"{folder} is there already; remove it, or name another folder")
    if problem := _why_not_written(folder / "config.json"):
        raise ValueError(f"cannot write into {str(folder)!r:.120}: {problem}; name another folder")


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long
        return False


def _why_not_written(path: Path) -> str | None:
    """Why no file can be written at a path; None if it can."""
    if max(len(os.fsencode(part)) for part in path.parts) > 255:
        return "a name in it is longer than 255 bytes"
    if path.is_dir():
        return "there is a folder of that name"
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        return f"{str(there)!r} is no folder"
    return None if os.access(there, os.W_OK) else f"{str(there)!r} may not be written to"


def check_is_no_file(name: str, words: str) -> None:
    """ValueError for words that are the name of a picture or clip."""
    from emu3.data.media import CLIPS, PICTURES

    if Path(words).suffix.lower() in PICTURES | CLIPS and (len(words.split()) == 1 or os.path.isfile(words)):
        raise ValueError(f"the {name} {words!r:.200} is the name of a file; give more files by --beside")


def read_still(name: str) -> Image.Image:
    """The picture to change. ValueError where there is none, it is a clip, or cannot be read."""
    from emu3.data.media import media_of

    if os.path.isfile(name) and media_of(name).kind == "clip":
        raise ValueError(f"{name!r} is a clip, and only pictures are edited; `emu3 video --start` goes on with a clip")
    return read_picture(name)


def read_picture(name: str) -> Image.Image:
    """The picture to look at. ValueError where there is none, or it cannot be read."""
    from PIL import Image

    if name.startswith(("http://", "https://")):
        raise ValueError(f"{name!r} is an address; download the picture first, as with `curl -O`, and name the file")
    try:
        with Image.open(name) as opened:
            opened.load()
            return opened
    except FileNotFoundError:
        raise ValueError(f"no picture at {name!r}; check the spelling (pictures come first, then words)") from None
    except IsADirectoryError:
        raise ValueError(f"{name!r} is a folder; name a picture") from None
    # What Pillow raises depends on the format and on where the file breaks.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {name!r} as a picture: {error}") from error


def read_media(name: str) -> Image.Image | Clip:
    """The picture, or the clip, to look at. ValueError where there is none, or it cannot be read."""
    if not name.lower().endswith(CLIPS):
        return read_picture(name)
    clip = read_start(name)
    return clip if len(clip) > 1 else clip.pictures[0]


def read_start(name: str) -> Clip:
    """The picture or clip that a clip begins with. ValueError where there is none, or it cannot be read."""
    from emu3.clips import read_clip

    try:
        return read_clip(name)
    except ValueError as error:
        raise ValueError(f"{name!r:.200}: {error}") from error
