"""A folder of captioned pictures for benchmarks: scenes of icons, crops of photographs, and some broken on purpose.

    python benchmarks/pictures.py FOLDER --count 20000

Half are scenes of 48x48 pixels as PNG; half are crops of scikit-image's photographs, 48 to 256 pixels a side, as JPEG.
Fifty files are damaged: empty, cut off, no picture, one pixel, or a line. The same arguments make the same pictures.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from emu3.icons.captions import full_caption
from emu3.icons.scenes import TASKS, render, sample_scene

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
BROKEN = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--broken", type=int, default=BROKEN)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    numbers = np.random.default_rng(0)
    photographs = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS]
    damaged = set(numbers.choice(arguments.count, arguments.broken, replace=False).tolist())
    for index in range(arguments.count):
        scene = sample_scene(TASKS[index % len(TASKS)], numbers, "train")
        if index % 2:
            height, width = (int(side) for side in numbers.integers(48, 257, 2))
            photograph = photographs[index // 2 % len(photographs)]
            limits = photograph.width - width, photograph.height - height
            left, top = (int(numbers.integers(0, limit)) for limit in limits)
            picture, suffix = photograph.crop((left, top, left + width, top + height)), "jpg"
        else:
            picture, suffix = Image.fromarray(render(scene)), "png"
        content = damage(index, picture, suffix) if index in damaged else encode(picture, suffix)
        (arguments.folder / f"{index:06}.{suffix}").write_bytes(content)
        (arguments.folder / f"{index:06}.txt").write_text(full_caption(scene))
    print(f"{arguments.folder}: {arguments.count} pictures, {len(damaged)} of them broken")


def encode(picture: Image.Image, suffix: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, {"png": "PNG", "jpg": "JPEG"}[suffix])
    return file.getvalue()


def damage(index: int, picture: Image.Image, suffix: str) -> bytes:
    """One of five kinds of damage, in turn."""
    whole = encode(picture, suffix)
    one_pixel, line = picture.resize((1, 1)), picture.resize((1000, 2))
    return [b"", whole[: len(whole) // 2], b"no picture", encode(one_pixel, suffix), encode(line, suffix)][
        index // 2 % 5
    ]


if __name__ == "__main__":
    main()
