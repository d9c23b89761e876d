"""Reads a clip of the icon world without any model, and says whether it shows what was asked for.

The last frame of every four shows a scene; the judge reads these, follows each object through them, and names its
motion. The frames between are compared with those that such objects would give.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emu3.icons.judge import background_of, read_picture
from emu3.icons.motion import FRAMES, Clip, ClipTask, Motion, Place, Track, render_clip
from emu3.icons.scenes import LATTICE, SIDES

LEAST_LIKENESS = 20.0
"""dB of a frame to the one that is expected, at which a clip counts as steady."""


@dataclass(frozen=True)
class WantedTrack:
    """An object that a clip must show, and what it must do; None: whatever."""

    noun: str
    color: str | None
    motion: Motion | None


def wanted_of(clip: Clip, task: ClipTask, colored: bool = True) -> tuple[WantedTrack, ...]:
    """What `clip_caption(clip, task, colored)` asks for."""
    motions = [None if task == "crossing" else track.motion for track in clip.tracks]
    return tuple(
        WantedTrack(track.noun, track.color if colored else None, motion)
        for track, motion in zip(clip.tracks, motions, strict=True)
    )


def read_tracks(frames: NDArray[np.uint8]) -> list[Track]:
    """The objects of a clip (T, height, width, 3) uint8, by noun and colour; places are those of the lattice.

    Of several objects of one noun and colour in a frame, the best counts.
    """
    scenes = []
    for frame in frames[FRAMES - 1 :: FRAMES]:
        found: dict[tuple[str, str], Place] = {}
        for thing in read_picture(np.ascontiguousarray(frame), sides=SIDES):
            x0, y0, x1, _ = thing.box
            place = Place(LATTICE * round(x0 / LATTICE), LATTICE * round(y0 / LATTICE), x1 - x0)
            found.setdefault((thing.noun, thing.color), place)
        scenes.append(found)
    names = sorted({name for scene in scenes for name in scene})
    return [Track(*name, tuple(scene.get(name) for scene in scenes)) for name in names]


@dataclass(frozen=True)
class ClipVerdict:
    """Of a clip: whether the nouns, their colours and their motions are right, each given the one before; and steady.

    `steady` says that nothing else is seen, and that the frames between two scenes are those that lie between.
    """

    objects: bool
    colors: bool
    motions: bool
    steady: bool

    @property
    def right(self) -> bool:
        """All but steadiness."""
        return self.objects and self.colors and self.motions


def judge_clip(frames: NDArray[np.uint8], wanted: Sequence[WantedTrack], task: ClipTask) -> ClipVerdict:
    """The verdict on a clip (T, height, width, 3)."""
    tracks = read_tracks(frames)
    nouns = {track.noun for track in tracks}
    objects = all(each.noun in nouns for each in wanted)
    matches = [
        [track for track in tracks if track.noun == each.noun and each.color in (None, track.color)] for each in wanted
    ]
    colors = objects and all(matches)
    if task == "crossing":
        motions = colors and len(matches) == 2 and any(cross(a, b) for a in matches[0] for b in matches[1])
    else:
        motions = colors and all(
            any(each.motion in (None, track.motion) for track in own) for each, own in zip(wanted, matches, strict=True)
        )
    return ClipVerdict(objects, colors, motions, is_steady(frames, tracks, len(wanted)))


def cross(a: Track, b: Track) -> bool:
    """Whether two objects pass each other: along one axis each ends on the other's side."""
    ends = [(a.places[k], b.places[k]) for k in (0, -1)]
    if any(place is None for pair in ends for place in pair):
        return False
    return any(
        (ends[0][0][axis] - ends[0][1][axis]) * (ends[1][0][axis] - ends[1][1][axis]) < 0  # type: ignore[index]
        for axis in (0, 1)
    )


def is_steady(frames: NDArray[np.uint8], tracks: Sequence[Track], count: int) -> bool:
    """Whether so many objects are there, and every frame is near the one that they would give."""
    background = background_of(np.ascontiguousarray(frames[-1]))
    if len(tracks) != count or background is None or len(frames) % FRAMES:
        return False
    try:
        expected = render_clip(Clip(tuple(tracks), background, *frames.shape[1:3]))
    except ValueError:  # objects that overlap or leave the picture
        return False
    errors = ((frames.astype(np.float64) - expected) ** 2).mean((1, 2, 3))
    return bool((10 * np.log10(255**2 / np.maximum(errors, 1e-9)) >= LEAST_LIKENESS).all())
