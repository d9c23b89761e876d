"""How much pictures of the same words differ in what the words leave open: places, colours, backgrounds.

A model may earn a reward by drawing always the same picture of a prompt. These figures show whether it does. They are
taken within each prompt, over pictures of several seeds, and averaged over prompts. Those of the training scenes, as
many a prompt, stand beside them. A noun counts in the pictures that show it as often as most do: a second dog where one
was asked for is a mistake, and no variety.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from emu3.icons.judge import background_of, read_picture
from emu3.icons.scenes import Scene


class Seen(NamedTuple):
    """What a picture shows: (noun, colour, x, y) of each object, and the background."""

    objects: tuple[tuple[str, str, int, int], ...]
    background: str | None

    @classmethod
    def in_picture(cls, picture: NDArray[np.uint8]) -> Self:
        """What the judge sees in a picture (height, width, 3)."""
        found = read_picture(picture)
        return cls(tuple((thing.noun, thing.color, *thing.box[:2]) for thing in found), background_of(picture))

    @classmethod
    def in_scene(cls, scene: Scene) -> Self:
        """What a scene has."""
        return cls(tuple((thing.noun, thing.color, thing.x, thing.y) for thing in scene.objects), scene.background)


@dataclass(frozen=True)
class Variety:
    """Figures of several prompts, each with several pictures.

    Attributes:
        x, y: where objects stand on average: their left and upper edge, in pixels.
        x_deviation, y_deviation: of the places of the same noun in pictures of the same prompt, in pixels.
        colors, backgrounds: entropy in bits within a prompt, of the colours of the same noun, and of the backgrounds.
    """

    x: float
    y: float
    x_deviation: float
    y_deviation: float
    colors: float
    backgrounds: float

    @classmethod
    def of(cls, groups: Sequence[Sequence[Seen]]) -> Self:
        """The figures of groups, each of pictures of one prompt. ValueError where no object is in any of them."""
        places: list[tuple[float, float]] = []
        variances: list[tuple[float, float]] = []
        colors: list[float] = []
        for group in groups:
            for noun in sorted({thing[0] for seen in group for thing in seen.objects}):
                own = [[thing for thing in seen.objects if thing[0] == noun] for seen in group]
                ((most, _),) = Counter(map(len, own)).most_common(1)
                if most == 0:  # a stray one
                    continue
                same = [thing for objects in own if len(objects) == most for thing in objects]
                at = np.array([thing[2:] for thing in same], float)
                places += [(x, y) for x, y in at.tolist()]
                variances.append((float(at[:, 0].var()), float(at[:, 1].var())))
                colors.append(entropy(thing[1] for thing in same))
        if not places:
            raise ValueError("no picture shows an object that most pictures of its prompt show")
        (x, y), (x_deviation, y_deviation) = np.mean(places, 0), np.sqrt(np.mean(variances, 0))
        backgrounds = float(np.mean([entropy(seen.background for seen in group) for group in groups]))
        return cls(float(x), float(y), float(x_deviation), float(y_deviation), float(np.mean(colors)), backgrounds)


def entropy(values: Iterable[object]) -> float:
    """Of how often each value occurs, in bits."""
    counts = np.array(list(Counter(values).values()), float)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum() + 0.0)
