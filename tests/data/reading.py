"""What tests of all kinds of sources share."""

import io
from pathlib import Path

from PIL import Image

from emu3.data.samples import Broken, Media, Sample
from emu3.data.sources import Source
from emu3.segments import Text


def save(path: Path, color: str = "red", size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, {".gif": "GIF", ".jpg": "JPEG"}.get(path.suffix.lower(), "PNG"))
    return path


def encoded(color: str = "red", size: tuple[int, int] = (6, 4), format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, format)
    return file.getvalue()


def read(source: Source) -> list[Sample | Broken]:
    return [each for piece in range(source.pieces) for each in source.read(piece)]


def told(source: Source) -> dict[str, list[str] | str]:
    """By key: role and text of each part, with the name of a file or the number of bytes; or the reason."""
    found: dict[str, list[str] | str] = {}
    for each in read(source):
        assert each.key not in found, each
        found[each.key] = each.reason if isinstance(each, Broken) else [_told_part(part) for part in each.parts]
    return found


def _told_part(part) -> str:
    match part.content:
        case Text(text):
            what = text
        case Media(kind, bytes() as content):
            what = f"{kind} of {len(content)}"
        case Media(kind, path):
            what = f"{kind} {path.rsplit('/', 1)[1]}"
    return f"{part.role}{'' if part.train else '*'} {what}"
