"""Clips of icons: what moves, grows, shrinks, appears or disappears, and the words for it.

A clip is a scene for every four frames, which share a frame of codes. The first four frames show the first scene. Over
the next four every object goes evenly from where it is to where the second scene has it, and so on: frame 4k + 3 shows
scene k, and the frames before it lie between scene k - 1 and scene k. So a scene's codes, with those before them, say
all of a clip, and the tokenizer's temporal layers have to find what lies between.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from emu3.icons.scenes import (
    BACKGROUNDS,
    COLORS,
    LATTICE,
    SIDES,
    Scene,
    SceneObject,
    Split,
    choose,
    find_held_out,
    paint,
)
from emu3.icons.sprites import ICON, NOUNS, scaled_mask

FRAMES = 4
"""Frames that share a frame of codes."""

MAX_SCENES = 4

Motion = Literal["left", "right", "up", "down", "growing", "shrinking", "appearing", "disappearing", "still"]
MOTIONS: tuple[Motion, ...] = get_args(Motion)
ClipTask = Literal["single_motion", "beside", "two_motions", "crossing"]
CLIP_TASKS: tuple[ClipTask, ...] = get_args(ClipTask)

_STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


class Place(NamedTuple):
    """Upper left corner and size of an object, in pixels."""

    x: int
    y: int
    side: int = ICON


@dataclass(frozen=True)
class Track:
    """One object of a clip: where it is in each scene; None where it is not there."""

    noun: str
    color: str
    places: tuple[Place | None, ...]

    @property
    def motion(self) -> Motion | None:
        """What it does, as a judge would say it; None where that has no word."""
        there = [place for place in self.places if place is not None]
        if not there:
            return None
        if len(there) < len(self.places):
            present = [place is not None for place in self.places]
            if len(set(there)) > 1 or sum(a != b for a, b in pairwise(present)) != 1:
                return None
            return "disappearing" if present[0] else "appearing"
        sides = [place.side for place in there]
        if sides[0] != sides[-1]:
            grows = sides[-1] > sides[0]
            is_steady = all((b >= a) if grows else (b <= a) for a, b in pairwise(sides))
            return ("growing" if grows else "shrinking") if is_steady else None
        dx, dy = there[-1].x - there[0].x, there[-1].y - there[0].y
        if not (dx or dy):
            return "still" if len(set(there)) == 1 else None
        if dx and dy:
            return None
        direction: Motion = ("left" if dx < 0 else "right") if dx else ("up" if dy < 0 else "down")
        return direction if _goes(there, direction) else None


def _goes(places: Sequence[Place], direction: Motion) -> bool:
    """Whether every step goes in that direction, or stands."""
    along_x, along_y = _STEPS[direction]
    steps = [((b.x - a.x), (b.y - a.y)) for a, b in pairwise(places)]
    return all(dx * along_x + dy * along_y == abs(dx) + abs(dy) for dx, dy in steps)


@dataclass(frozen=True)
class Clip:
    """Tracks on a background (a name of `BACKGROUNDS`), in frames of `height` x `width` pixels.

    `ValueError` where a scene of it is none.
    """

    tracks: tuple[Track, ...]
    background: str
    height: int = 48
    width: int = 48

    def __post_init__(self) -> None:
        if len({len(track.places) for track in self.tracks}) != 1:
            raise ValueError("tracks of a clip have one place for each scene")
        assert self.scenes

    @property
    def scenes(self) -> tuple[Scene, ...]:
        """One for every four frames."""
        return tuple(
            Scene(
                tuple(
                    SceneObject(track.noun, track.color, *place)
                    for track in self.tracks
                    if (place := track.places[number]) is not None
                ),
                self.background,
                self.height,
                self.width,
            )
            for number in range(len(self.tracks[0].places))
        )


def render_clip(clip: Clip) -> NDArray[np.uint8]:
    """The frames, (4 x scenes, height, width, 3) uint8 RGB."""
    count = len(clip.tracks[0].places)
    frames = np.empty((FRAMES * count, clip.height, clip.width, 3), np.float32)
    frames[:] = BACKGROUNDS[clip.background]
    for number in range(count):
        for part in range(FRAMES):
            share = (part + 1) / FRAMES
            for track in clip.tracks:
                after = track.places[number]
                _paint_between(
                    frames[FRAMES * number + part], track, track.places[number - 1] if number else after, after, share
                )
    return np.rint(frames).astype(np.uint8)


def _paint_between(
    frame: NDArray[np.float32], track: Track, before: Place | None, after: Place | None, share: float
) -> None:
    """Draws an object that has gone a share of the way; one that comes or goes is partly transparent."""
    place, alpha = after or before, 1.0
    if place is None:
        return
    if before is None or after is None:
        alpha = share if after is not None else 1 - share
        before = after = place
    x, y, side = (round(a + (b - a) * share) for a, b in zip(before, after, strict=True))
    paint(frame, alpha * scaled_mask(track.noun, side), track.color, x, y)


def clip_caption(clip: Clip, task: ClipTask, colored: bool = True) -> str:
    """The words that ask for a clip: "a clip of a red dog moving left", "a clip of a cat growing and a car moving up".

    "a clip of a red dog moving left beside a blue car"; "a clip of a red dog and a blue car crossing".
    """
    names = [_with_article(f"{track.color} {track.noun}" if colored else track.noun) for track in clip.tracks]
    if task == "crossing":
        return f"a clip of {names[0]} and {names[1]} crossing"
    if task == "beside":
        return f"a clip of {names[0]} {_words(clip.tracks[0].motion)} beside {names[1]}"
    said = [f"{name} {_words(track.motion)}" for name, track in zip(names, clip.tracks, strict=True)]
    return f"a clip of {' and '.join(said)}"


def _words(motion: Motion | None) -> str:
    assert motion is not None and motion != "still", motion
    return f"moving {motion}" if motion in _STEPS else motion


def _with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def sample_clip(
    task: ClipTask, rng: np.random.Generator, split: Split, scenes: int | None = None, height: int = 48, width: int = 48
) -> Clip:
    """A clip of the task, determined by the state of `rng`; of two to four scenes unless `scenes` says how many.

    "train" never shows a held-out pair, "test" always does: a noun and its colour, or the two nouns.
    `ValueError` for an unknown task.
    """
    if task not in CLIP_TASKS:
        raise ValueError(f"no task {task!r}; the tasks are {', '.join(CLIP_TASKS)}")
    counts = [count for count in range(2, MAX_SCENES + 1) if fits(task, count, height, width)]
    if scenes is not None:
        counts = [scenes] if fits(task, scenes, height, width) else []
    if not counts:
        raise ValueError(f"{task} does not fit into {scenes or MAX_SCENES} scenes of {width}x{height} pixels")
    while True:
        count = choose(counts, rng)
        names = _sample_names(1 if task == "single_motion" else 2, rng)
        if any(find_held_out(names)) != (split == "test"):
            continue
        if task == "crossing":
            paths = _sample_crossing(count, height, width, rng)
        else:
            moves = [choose(MOTIONS[:-1], rng) for _ in names]
            if task == "beside":
                moves[1] = "still"
            paths = [_sample_path(move, count, height, width, rng) for move in moves]
        if paths and all(paths) and not any(_meet(a, b) for a, b in combinations(paths, 2)):
            tracks = tuple(Track(*name, tuple(path)) for name, path in zip(names, paths, strict=True))
            return Clip(tracks, choose(BACKGROUNDS, rng), height, width)


def fits(task: ClipTask, scenes: int, height: int, width: int) -> bool:
    """Whether there are clips of a task in so many scenes of a size. Two that cross have to pass each other."""
    room = min(2 * ICON * (scenes - 1), max(height, width) - ICON)  # for the way that each goes, at most
    enough = task != "crossing" or (scenes > 2 and room > ICON)
    return enough and 2 <= scenes <= MAX_SCENES and min(height, width) >= 2 * ICON


def _sample_names(count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    nouns = rng.permutation(len(NOUNS))[:count]
    return [(NOUNS[index], choose(COLORS, rng)) for index in nouns]


Path = list[Place | None]


def _sample_path(move: Motion, count: int, height: int, width: int, rng: np.random.Generator) -> Path:
    """Places for each scene; none where there is no room."""
    start = Place(_pick(width - ICON, rng), _pick(height - ICON, rng))
    if move == "still":
        return [start] * count
    if move in ("appearing", "disappearing"):
        change = int(rng.integers(1, count))
        is_there = [number >= change if move == "appearing" else number < change for number in range(count)]
        return [start if there else None for there in is_there]
    if move in ("growing", "shrinking"):
        sides = [SIDES[min(number, len(SIDES) - 1)] for number in range(count)]
        largest = sides[-1]
        room = largest - ICON
        if width < largest or height < largest:
            return []
        corner = Place(_pick(width - largest, rng), _pick(height - largest, rng))
        path: Path = [
            Place(corner.x + (room - side + ICON) // 2, corner.y + (room - side + ICON) // 2, side) for side in sides
        ]
        return path if move == "growing" else path[::-1]
    along_x, along_y = _STEPS[move]
    length = LATTICE * int(rng.integers(1, 4)) * (count - 1)
    room_x, room_y = width - ICON - length * abs(along_x), height - ICON - length * abs(along_y)
    if min(room_x, room_y) < 0:
        return []
    x, y = _pick(room_x, rng), _pick(room_y, rng)
    step = length // (count - 1)
    x, y = x + length * (along_x < 0), y + length * (along_y < 0)
    return [Place(x + number * step * along_x, y + number * step * along_y) for number in range(count)]


def _sample_crossing(count: int, height: int, width: int, rng: np.random.Generator) -> list[Path]:
    """Two that pass each other, one above the other or side by side."""
    upright = bool(rng.integers(2))
    long, short = (height, width) if upright else (width, height)
    step = LATTICE * int(rng.integers(2, 5))
    length = step * (count - 1)
    if length <= ICON or long - ICON < length or short < 2 * ICON:
        return []
    first, second = _pick(long - ICON - length, rng), _pick(long - ICON - length, rng)
    near = _pick(short - 2 * ICON, rng)
    far = near + ICON + _pick(short - 2 * ICON - near, rng)
    across = [near, far] if rng.integers(2) else [far, near]
    along = [
        [first + number * step for number in range(count)],
        [second + length - number * step for number in range(count)],
    ]
    if upright:
        return [[Place(side, each) for each in own] for side, own in zip(across, along, strict=True)]
    return [[Place(each, side) for each in own] for side, own in zip(across, along, strict=True)]


def _pick(most: int, rng: np.random.Generator) -> int:
    """A point of the lattice from 0 to `most`."""
    return LATTICE * int(rng.integers(most // LATTICE + 1))


def _meet(a: Path, b: Path) -> bool:
    """Whether two objects overlap in a scene or on the way between two."""
    for (a0, a1), (b0, b1) in zip(pairwise(a), pairwise(b), strict=True):
        for share in np.linspace(0, 1, FRAMES + 1):
            one, other = (_between(*each, share) for each in ((a0, a1), (b0, b1)))
            if one is None or other is None:
                continue
            if all(max(one[d], other[d]) < min(one[d] + one[2], other[d] + other[2]) for d in (0, 1)):
                return True
    return False


def _between(before: Place | None, after: Place | None, share: float) -> tuple[float, ...] | None:
    if before is None or after is None:
        return before or after
    return tuple(a + (b - a) * share for a, b in zip(before, after, strict=True))
