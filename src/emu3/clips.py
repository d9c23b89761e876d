"""Clips as arrays of frames: read from a list, an array, an animation or a video file, and written as one.

GIF and WebP are read and written by Pillow, everything else by PyAV (`pip install -e '.[video]'` in a clone).

Letters: C, H, T, W, see CONTRIBUTING.md.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from emu3.options import check_number
from emu3.pictures import data_url, picture_formats, read_pixels, to_channels_last
from emu3.suffixes import ANIMATIONS, CLIPS

MAX_FRAMES = 1024
"""Of a clip that is read, unless another number is asked for. What a file has beyond them is left out."""

MAX_RATE = 1e4
"""Frames a second."""

MAX_PIXELS = 2**29
"""Of all frames of a clip that is read together: 1.6 GB as bytes, 64 frames of 3840x2160."""

_Frame = TypeVar("_Frame")
_MOVING = ("GIF", "WEBP", "PNG")
# Formats of files that hold their own pictures. Playlists, of which FFmpeg opens what they name, are not among them.
_DEMUXERS = "mov,matroska,avi,mpeg,mpegvideo,mpegts,ogg,asf,flv,m4v,h264,hevc,ivf"
# What browsers take for a frame that is shown for no time.
_MILLISECONDS = 100


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames one after the other. A notebook plays it. ValueError where they are no bytes (T, H, W, 3).

    Attributes:
        frames_THWC: as bytes, RGB.
        frames_per_second: None where it is not known.
    """

    frames_THWC: NDArray[np.uint8]
    frames_per_second: float | None = None

    def __post_init__(self) -> None:
        frames = self.frames_THWC
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not frames.size:
            raise ValueError(
                f"frames are bytes (T, H, W, 3), at least one pixel, got {frames.dtype} {frames.shape}; see read_clip"
            )

        if self.frames_per_second is not None:
            check_number("frames_per_second", self.frames_per_second, 1e-3, MAX_RATE)

    def __len__(self) -> int:
        return len(self.frames_THWC)

    @property
    def pictures(self) -> list[Image.Image]:
        """The frames."""
        return [Image.fromarray(frame) for frame in self.frames_THWC]

    def save(self, file: str | os.PathLike[str] | BinaryIO, format: str | None = None) -> None:
        """Writes it as an animation or a video, by the file's suffix or `format`: GIF, WebP, MP4, MOV, MKV, WebM, AVI.

        A clip whose rate is not known gets 10 frames a second. ValueError for another suffix, for frames that a video
        cannot have, or where PyAV is needed and not installed; then no file is left.
        """
        suffix = format or (Path(os.fspath(file)).suffix if isinstance(file, str | os.PathLike) else "")
        suffix = f".{suffix.lstrip('.').lower()}"
        if suffix not in CLIPS:
            known = ", ".join(CLIPS)
            raise ValueError(f"a clip is not written as {suffix[1:] or 'a file without suffix'!r}; give one of {known}")
        made = io.BytesIO()
        (self._write_animation if suffix in ANIMATIONS else self._write_video)(made, suffix[1:])
        if isinstance(file, str | os.PathLike):
            Path(file).write_bytes(made.getvalue())
        else:
            file.write(made.getvalue())

    def _write_animation(self, file: BinaryIO, format: str) -> None:
        rate = self.frames_per_second or 1000 / _MILLISECONDS
        unit = 10 if format == "gif" else 1  # milliseconds that a time is a multiple of
        if rate > 1000 / (2 * unit):
            raise ValueError(f"{rate:g} frames a second are more than a {format} can have; write another format")
        first, *rest = self.pictures
        options: dict[str, Any] = {"lossless": True} if format == "webp" else {"disposal": 1}
        ends = [unit * round(1000 * number / rate / unit) for number in range(len(self) + 1)]
        times = [end - start for start, end in pairwise(ends)]
        try:
            first.save(file, format, save_all=True, append_images=rest, duration=times, loop=0, **options)
        except OverflowError:  # frames that are alike are one, and shown for as long as all of them
            raise ValueError(f"{format} has no frame that is shown so long; write another format") from None

    def _write_video(self, file: BinaryIO, format: str) -> None:
        av = _pyav()
        _, height, width, _ = self.frames_THWC.shape
        rate = Fraction(self.frames_per_second or 1000 / _MILLISECONDS).limit_denominator(1001)
        container = {"mkv": "matroska", "m4v": "mp4"}.get(format, format)
        try:
            with av.open(file, "w", format=container) as output:
                stream = output.add_stream("libvpx-vp9" if format == "webm" else "libx264", rate=rate)
                stream.width, stream.height = width, height
                # Colours at half the size need even sides.
                stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
                stream.options = {"crf": "18"}
                if format != "webm":
                    # The same frames, the same bytes: of narrow clips, x264's tree of macroblocks reads memory that
                    # nobody has set, and the file comes to depend on it.
                    stream.options |= {"x264-params": "mbtree=0"}
                for frame in self.frames_THWC:
                    pixels = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                    output.mux(stream.encode(pixels))
                output.mux(stream.encode())
        except av.FFmpegError as error:
            raise ValueError(f"cannot write a clip of {width}x{height} pixels as {format}: {error}") from error

    def _repr_html_(self) -> str:
        file = io.BytesIO()
        self.save(file, "webp")
        scale = max(1, 192 // max(self.frames_THWC.shape[1:3]))
        width = scale * self.frames_THWC.shape[2]
        url = data_url(file.getvalue(), "image/webp")
        return f'<img src="{url}" width="{width}" style="image-rendering: pixelated">'


def read_clip(source: Any, max_frames: int = MAX_FRAMES, max_pixels: int | None = None, evenly: bool = False) -> Clip:
    """The first frames of a clip, at most `max_frames`.

    Args:
        source: a `Clip`; a list of frames, each a PIL picture, an array, a tensor or a path; an array or tensor
            (T, H, W, C) or (T, C, H, W); a PIL animation; the path of an animation or a video; or the bytes of one. A
            picture in any of these forms is a clip of one frame.
        max_frames: what it has beyond them is left out.
        max_pixels: of all frames of a file together. Default: `MAX_PIXELS`.
        evenly: whether the frames are spread over the whole clip instead, however long a video is; of an animation,
            over its first `MAX_FRAMES`. The clip then has as many a second as that comes to.

    Raises:
        ValueError: it is none of these, has no frames or frames of several sizes, or is too large; a file is damaged.
    """
    most = max(max_frames, MAX_FRAMES) if evenly else max_frames
    here = None if evenly else max_frames  # of what is in memory
    if isinstance(source, Clip):
        frames, rate = list(source.frames_THWC[:here]), source.frames_per_second
    elif isinstance(source, Image.Image):
        frames, rate = frames_of_animation(source, most, max_pixels)
    elif isinstance(source, bytes | str | os.PathLike):
        frames, rate = _read_file(source, most, max_pixels, max_frames if evenly else None)
    else:
        if getattr(source, "ndim", None) in (2, 3):
            source = [source]
        if not isinstance(source, Sequence) and getattr(source, "ndim", None) != 4:
            raise ValueError(
                f"{source!r:.80}, a {type(source).__name__}, is no clip; give a list of frames, an array (T, H, W, C), "
                "or a file's path"
            )
        several = source[:here]
        if evenly:
            several, _ = spread(several, None, max_frames)
        frames, rate = [_as_bytes(frame) for frame in several], None
    if evenly:
        frames, rate = spread(frames, rate, max_frames)
    return Clip(stack_frames(frames), rate)


def spread(frames: Iterable[_Frame], rate: float | None, count: int) -> tuple[list[_Frame], float | None]:
    """At most `count` of many frames, evenly spaced, and their rate. Keeps at most four times `count` in memory."""
    kept: list[_Frame] = []
    total, step = 0, 1
    for frame in frames:
        if total % step == 0:
            if len(kept) == 4 * count:
                kept, step = kept[::2], 2 * step
            kept.append(frame)
        total += 1
    places = np.linspace(0, len(kept) - 1, min(count, len(kept))).round().astype(int)
    return [kept[place] for place in places], rate and rate * len(places) / max(1, total)


def _as_bytes(frame: Any) -> NDArray[np.uint8]:
    if isinstance(frame, str | os.PathLike):
        frames, _ = _read_file(frame, 1)
        return frames[0]
    pixels, _ = to_channels_last(frame, True, None)
    if pixels.dtype.kind == "f" and pixels.min() >= 0 and pixels.max() <= 1:
        pixels = pixels * 255
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def stack_frames(frames: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Frames (H, W, C) as one array (T, H, W, C). ValueError where there are none, or of several sizes."""
    if not len(frames):
        raise ValueError("the clip has no frames; give at least one")
    if len(sizes := {frame.shape for frame in frames}) > 1:
        raise ValueError(f"the clip has frames of {len(sizes)} sizes; give it one")
    return np.stack(frames)


def _read_file(
    source: bytes | str | os.PathLike[str],
    max_frames: int,
    max_pixels: int | None = None,
    count: int | None = None,
) -> tuple[list[NDArray[np.uint8]], float | None]:
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise ValueError(f"there is no file {os.fspath(source)!r:.200}; check the spelling")
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        start = file.read(12)
        file.seek(0)
        if not start:
            raise ValueError("the file is empty")
        if not is_animation(start):
            return frames_of_video(file, max_frames, max_pixels, count)
        try:
            with Image.open(file, formats=picture_formats()) as picture:
                return frames_of_animation(picture, max_frames, max_pixels)
        except ValueError:
            raise
        except UnidentifiedImageError as error:  # its own words are those of Python
            raise ValueError("cannot read the clip, the file is damaged at its beginning") from error
        except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, struct.error ...
            raise ValueError(f"cannot read the clip, the file is damaged: {error}") from error


def moves(source: Any) -> bool:
    """Whether a file, by its name, or an open picture is a clip: a video, or an animation of several frames."""
    if isinstance(source, Image.Image):
        return bool(getattr(source, "is_animated", False)) and source.format in _MOVING
    if not isinstance(source, str | os.PathLike) or not os.path.isfile(source):
        return False
    suffix = os.path.splitext(source)[1].lower()
    if suffix not in ANIMATIONS:
        return suffix in CLIPS
    try:
        with Image.open(source, formats=_MOVING) as picture:
            return moves(picture)
    except OSError:  # whoever reads it says what is wrong
        return False


def is_animation(start: bytes) -> bool:
    """Whether a file that begins so is for Pillow."""
    known = (b"GIF", b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"BM", b"II*\0", b"MM\0*")
    return start.startswith(known) or start[8:12] == b"WEBP"


def frames_of_animation(
    picture: Image.Image, max_frames: int, max_pixels: int | None = None
) -> tuple[list[NDArray[np.uint8]], float | None]:
    """The first frames of an open animation, and how many a second has; None for a picture that does not move.

    Frames may be shown for different times. Then all but the shortest come several times, so that all are as long.
    """
    count = picture.n_frames if moves(picture) else 1  # type: ignore[attr-defined]  # of what moves
    check_pixels(picture.width * picture.height, min(count, max_frames), max_pixels)
    frames: list[NDArray[np.uint8]] = []
    times: list[float] = []
    for number in range(min(count, max_frames)):
        picture.seek(number)
        frames.append(np.rint(read_pixels(picture, convert_rgb=True)).astype(np.uint8))
        times.append(picture.info.get("duration") or _MILLISECONDS)
    if count == 1:
        return frames, None
    turns = _turns_of(times)
    check_pixels(picture.width * picture.height, min(sum(turns), max_frames), max_pixels)
    repeated = (frame for frame, again in zip(frames, turns, strict=True) for _ in range(again))
    return list(islice(repeated, max_frames)), 1000 * sum(turns) / sum(times)


def _turns_of(times: Sequence[float]) -> list[int]:
    """How many frames of one length come nearest to each time in milliseconds.

    The length is the shortest time, or within 10 ms of it: so much a GIF's times are rounded.
    """
    shortest = max(10.0, min(times))
    wholes = np.asarray(times)[:, None]
    beats = np.linspace(max(10.0, shortest - 10), shortest + 10, 81)
    turns = np.maximum(1, np.rint(wholes / beats))
    errors = np.abs(wholes - turns * beats).sum(0)
    return [int(each) for each in turns[:, errors.argmin()]]


def frames_of_video(
    file: BinaryIO, max_frames: int, max_pixels: int | None = None, count: int | None = None
) -> tuple[list[NDArray[np.uint8]], float | None]:
    """The first frames of a video file, turned upright, and how many a second has. ValueError where it is none.

    With a `count`, so many of all its frames, evenly spaced.
    """
    with opened_video(file, max_pixels) as (container, stream):
        found = stream.average_rate or stream.guessed_rate
        rate = float(found) if found else None
        decoded = container.decode(stream)
        if count is None:
            decoded = islice(decoded, max_frames)
        else:
            decoded, rate = spread(decoded, rate, count)
        frames: list[NDArray[np.uint8]] = []
        for frame in decoded:
            check_pixels(frame.width * frame.height, len(frames) + 1, max_pixels)
            turns = round(getattr(frame, "rotation", 0) / 90) % 4
            frames.append(np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns)))
    return frames, rate


@contextmanager
def opened_video(file: BinaryIO, max_pixels: int | None = None) -> Iterator[tuple[Any, Any]]:
    """Container and stream of a video. Any error inside becomes a ValueError."""
    av = _pyav()
    try:
        with av.open(file, options={"format_whitelist": _DEMUXERS}) as container:
            if not container.streams.video:
                raise ValueError("the file has no pictures, only sound")
            stream = container.streams.video[0]
            check_pixels(stream.codec_context.height * stream.codec_context.width, 1, max_pixels)
            yield container, stream
    except Exception as error:  # PyAV's own, and what decoders raise
        raise ValueError(f"cannot read the clip: {getattr(error, 'strerror', None) or error}") from error


def check_pixels(pixels: int, frames: int, most: int | None = None) -> None:
    """ValueError for a clip that would not fit: frames of so many pixels."""
    most = MAX_PIXELS if most is None else most
    if pixels * frames > most:
        raise ValueError(
            f"{frames} frames of {pixels:,} pixels are more than {most:,} pixels together; give fewer or smaller frames"
        )


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise ValueError(
            "videos are read and written by PyAV; install it by: pip install -e '.[video]' in the clone"
        ) from error
    return av
