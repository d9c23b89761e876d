"""Random crops of people's pictures and clips: what a vision tokenizer is trained on.

    source -> list of its pictures and clips -> some are held out -> batches, pure functions of the step

Letters: B, C, T, H, W, see CONTRIBUTING.md.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from emu3.data.media import open_clip, open_picture_of
from emu3.data.samples import Media, Sample
from emu3.data.sources import Source
from emu3.training.vision import PictureBatch

Kind = Literal["picture", "clip"]

MAX_CLIP_FRAMES = 128
"""Frames of a clip that are read: its first ones."""

PIECES_AT_ONCE, STEPS_OF_PIECES = 8, 64
"""Where pictures lie in archives, so many of them are open at a time, for so many steps."""

_TRIES = 50  # to find a file that is not broken
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """A picture or clip of a source: the sample's key, the piece, and its number among the pictures of the piece.

    `file` is where it lies, or None where it has to be read from its piece.
    """

    key: str
    kind: Kind
    piece: int
    number: int
    file: str | None


@dataclass(frozen=True, kw_only=True)
class CropSettings:
    """How crops are cut.

    Attributes:
        size: height and width of a crop in pixels.
        zoom: a crop shows between 1 / zoom and all of a picture's shorter side, but is not enlarged for it.
        flip: whether every second crop is mirrored.
        recolor: share of the crops whose red, green and blue change places, so that few pictures teach all colours.
        frames: of a clip.
        stride: from one frame of a crop to the next, in frames of the clip.
        cache_megabytes: of decoded pictures that each process keeps.
    """

    size: int
    zoom: float = 4.0
    flip: bool = True
    recolor: float = 0.0
    frames: int = 8
    stride: int = 1
    cache_megabytes: int = 1024


def media_of_piece(source: Source, piece: int) -> list[tuple[str, Media]]:
    """Every picture and clip of a piece, with its sample's key, in order."""
    samples = (each for each in source.read(piece) if isinstance(each, Sample))
    return [(each.key, part.content) for each in samples for part in each.parts if isinstance(part.content, Media)]


def find_media(source: Source) -> list[Found]:
    """Every picture and clip of a source, none of them opened. ValueError where there is none."""
    found = [
        Found(key, media.kind, piece, number, media.file if isinstance(media.file, str) else None)
        for piece in range(source.pieces)
        for number, (key, media) in enumerate(media_of_piece(source, piece))
    ]
    if not found:
        raise ValueError(f"{source.name!r} has no pictures or clips to train on; `emu3 data` says what is in it")
    return found


def split(found: Sequence[Found], share: float) -> tuple[list[Found], list[Found]]:
    """Those to train on, and those held out: a share chosen by a hash of the keys, of each kind at least one of two.

    What is held out does not depend on what else is in the source, unless its share is below one.
    """
    training, held_out = [], []
    for kind in ("picture", "clip"):
        scored = [(_score(each.key), each) for each in found if each.kind == kind and share]
        scored.sort(key=lambda pair: pair[0])  # the pictures of one sample have one score
        of_kind = [each for each in found if each.kind == kind]
        chosen = {each for score, each in scored if score < share} or {each for _, each in scored[: len(scored) > 1]}
        training += [each for each in of_kind if each not in chosen]
        held_out += [each for each in of_kind if each in chosen]
    return training, held_out


def _score(key: str) -> float:
    """Between 0 and 1, by nothing but the key."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


class Crops:
    """Crops of some pictures and clips of a source. Pickled, it leaves its decoded pictures behind."""

    def __init__(self, source: Source, found: Sequence[Found], settings: CropSettings, seed: int) -> None:
        self.source, self.settings, self.seed = source, settings, seed
        self._of_kind = {kind: tuple(each for each in found if each.kind == kind) for kind in ("picture", "clip")}
        self._decoded: OrderedDict[Found, NDArray[np.uint8]] = OrderedDict()
        self._bytes = 0
        self._pieces: OrderedDict[int, list[tuple[str, Media]]] = OrderedDict()
        self._broken: set[Found] = set()

    def __getstate__(self) -> dict[str, Any]:
        empty = {"_decoded": OrderedDict(), "_bytes": 0, "_pieces": OrderedDict(), "_broken": set()}
        return self.__dict__ | empty

    def has(self, kind: Kind) -> bool:
        """Whether there is a picture, or a clip."""
        return bool(self._of_kind[kind])

    def batch(self, clip_share: float, size: int, step: int, part: int = 0) -> PictureBatch:
        """So many pictures, or clips of so many frames in all, whichever chance says. A pure function of the numbers.

        Where there are no pictures, frames of clips take their place.
        """
        draws_clips = np.random.default_rng([self.seed, 0, step, part]).random() < clip_share
        if draws_clips and self.has("clip"):
            return PictureBatch(self.clips(max(1, size // self.settings.frames), step, part), step=step)
        return PictureBatch(self.pictures(size, step, part), step=step)

    def pictures(self, count: int, step: int, part: int = 0) -> Tensor:
        """Pictures (B, C, H, W) in [-1, 1]."""
        kind: Kind = "picture" if self.has("picture") else "clip"
        return torch.stack([self._crop(kind, 1, step, part, index)[0] for index in range(count)])

    def clips(self, count: int, step: int, part: int = 0) -> Tensor:
        """Clips (B, T, C, H, W) in [-1, 1]."""
        frames = self.settings.frames
        return torch.stack([self._crop("clip", frames, step, part, index) for index in range(count)])

    def _crop(self, kind: Kind, frames: int, step: int, part: int, index: int) -> Tensor:
        rng = np.random.default_rng([self.seed, 1, step, part, index])
        for _ in range(_TRIES):
            each = self._draw(rng, kind, step)
            if each in self._broken:
                continue
            try:
                return cut(self._open(each), frames, self.settings, rng)
            except ValueError as error:
                self._broken.add(each)
                _log.warning("%s is left out: %s", each.key, error)
        raise ValueError(f"{_TRIES} files of {self.source.name!r} in a row cannot be opened; `emu3 data` says why")

    def _draw(self, rng: np.random.Generator, kind: Kind, step: int) -> Found:
        choice = self._of_kind[kind]
        if any(each.file is None for each in choice[:1]):
            # Archives have no order but their own: for a while, only some of their pieces are read.
            pieces = np.array([each.piece for each in choice])
            names, counts = np.unique(pieces, return_counts=True)
            chooser = np.random.default_rng([self.seed, 2, step // STEPS_OF_PIECES])
            some = chooser.choice(names, min(PIECES_AT_ONCE, len(names)), replace=False, p=counts / counts.sum())
            places = np.isin(pieces, some).nonzero()[0]
            return choice[places[rng.integers(len(places))]]
        return choice[rng.integers(len(choice))]

    def _open(self, each: Found) -> NDArray[np.uint8]:
        """Frames (T, H, W, C), one of a picture, no larger than crops need."""
        if each in self._decoded:
            self._decoded.move_to_end(each)
            return self._decoded[each]
        media = Media(each.kind, each.file) if each.file is not None else self._read(each)
        if each.kind == "clip":
            frames = [Image.fromarray(frame) for frame in open_clip(media, MAX_CLIP_FRAMES).frames_THWC]
        else:
            frames = [open_picture_of(media)]
        decoded = np.stack([np.asarray(shrink(frame, self.settings)) for frame in frames])
        self._decoded[each] = decoded
        self._bytes += decoded.nbytes
        while self._bytes > self.settings.cache_megabytes * 2**20 and len(self._decoded) > 1:
            self._bytes -= self._decoded.popitem(last=False)[1].nbytes
        return decoded

    def _read(self, each: Found) -> Media:
        if each.piece not in self._pieces:
            self._pieces[each.piece] = media_of_piece(self.source, each.piece)
            while len(self._pieces) > PIECES_AT_ONCE:
                self._pieces.popitem(last=False)
        return self._pieces[each.piece][each.number][1]


def shrink(picture: Image.Image, settings: CropSettings) -> Image.Image:
    """The picture at the size that its crops need: the smallest of them is not scaled."""
    shorter, wanted = min(picture.size), round(settings.size * settings.zoom)
    wanted = min(max(shorter, settings.size), wanted)  # a picture smaller than a crop is enlarged
    if shorter == wanted:
        return picture
    size = [max(wanted, round(side * wanted / shorter)) for side in picture.size]
    return picture.resize((size[0], size[1]), Image.Resampling.BICUBIC, reducing_gap=3.0)


def cut(frames_THWC: NDArray[np.uint8], count: int, settings: CropSettings, rng: np.random.Generator) -> Tensor:
    """So many frames of a random window (T, C, H, W) in [-1, 1]. Of a clip that is too short, the last frame lasts."""
    length, height, width = frames_THWC.shape[:3]
    stride = min(settings.stride, max(1, (length - 1) // max(1, count - 1)))
    first = rng.integers(max(1, length - stride * (count - 1)))
    shorter = min(height, width)
    side = min(shorter, round(settings.size * (shorter / settings.size) ** rng.random()))
    top, left = rng.integers(height - side + 1), rng.integers(width - side + 1)
    mirrored = settings.flip and rng.random() < 0.5
    channels = rng.permutation(3) if settings.recolor and rng.random() < settings.recolor else np.arange(3)
    chosen = []
    for number in range(count):
        frame = frames_THWC[min(first + stride * number, length - 1), top : top + side, left : left + side]
        if side != settings.size:
            picture = Image.fromarray(frame).resize((settings.size, settings.size), Image.Resampling.BICUBIC)
            frame = np.asarray(picture)
        chosen.append(frame[:, ::-1] if mirrored else frame)
    return torch.from_numpy(np.stack(chosen)[..., channels]).movedim(-1, 1).float() / 127.5 - 1.0
