"""Draw the sprite sheet of the icon world from the SVG files of `@mdi/svg`.

Run once, and again only to change the icons; nothing at run time needs it:

    npm pack @mdi/svg@7.4.47 && tar xf mdi-svg-7.4.47.tgz && pip install resvg-py==0.5.0 pillow numpy
    python recipes/icons/rasterise.py package/svg src/emu3/icons/assets
"""

import io
import json
import sys
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

ICON = 16
COLUMNS = 8
OVERSAMPLED = 960  # pixels a side of the drawing that is averaged down

# noun, plural, name of the icon
ICONS = [
    ("airplane", "airplanes", "airplane"),
    ("anchor", "anchors", "anchor"),
    ("apple", "apples", "food-apple"),
    ("backpack", "backpacks", "bag-personal"),
    ("bench", "benches", "bench-back"),
    ("bird", "birds", "bird"),
    ("boat", "boats", "sail-boat"),
    ("bone", "bones", "bone"),
    ("bottle", "bottles", "bottle-wine"),
    ("bus", "buses", "bus"),
    ("car", "cars", "car-side"),
    ("cat", "cats", "cat"),
    ("chair", "chairs", "seat"),
    ("clock", "clocks", "clock"),
    ("cloud", "clouds", "cloud"),
    ("crown", "crowns", "crown"),
    ("cup", "cups", "coffee"),
    ("dog", "dogs", "dog-side"),
    ("duck", "ducks", "duck"),
    ("elephant", "elephants", "elephant"),
    ("flag", "flags", "flag"),
    ("flower", "flowers", "flower-tulip"),
    ("guitar", "guitars", "guitar-acoustic"),
    ("hat", "hats", "hat-fedora"),
    ("heart", "hearts", "heart"),
    ("horse", "horses", "horse"),
    ("house", "houses", "home"),
    ("key", "keys", "key"),
    ("kite", "kites", "kite"),
    ("lamp", "lamps", "lamp"),
    ("moon", "moons", "moon-waning-crescent"),
    ("mushroom", "mushrooms", "mushroom"),
    ("pencil", "pencils", "pencil"),
    ("rabbit", "rabbits", "rabbit"),
    ("shirt", "shirts", "tshirt-crew"),
    ("star", "stars", "star"),
    ("tree", "trees", "pine-tree"),
    ("trophy", "trophies", "trophy"),
    ("truck", "trucks", "truck"),
    ("umbrella", "umbrellas", "umbrella"),
]


def rasterise(svg: str) -> np.ndarray:
    """Alpha mask (16, 16) uint8 of one icon: its ink, centred in the smallest square around it, area-averaged."""
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=OVERSAMPLED, height=OVERSAMPLED))
    alpha = np.asarray(Image.open(io.BytesIO(png)))[..., 3]
    rows, columns = np.nonzero(alpha > 127)
    ink = alpha[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    side = max(ink.shape)
    square = np.zeros((side, side), np.uint8)
    top, left = (side - ink.shape[0]) // 2, (side - ink.shape[1]) // 2
    square[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return np.asarray(Image.fromarray(square).resize((ICON, ICON), Image.Resampling.BOX))


def main(svg_folder: Path, assets: Path) -> None:
    """Write `icons.png` (greyscale grid, eight icons a row) and `icons.json` (its table) into `assets`."""
    sheet = np.zeros((-(-len(ICONS) // COLUMNS) * ICON, COLUMNS * ICON), np.uint8)
    table = []
    for index, (noun, plural, source) in enumerate(ICONS):
        top, left = index // COLUMNS * ICON, index % COLUMNS * ICON
        sheet[top : top + ICON, left : left + ICON] = rasterise((svg_folder / f"{source}.svg").read_text())
        table.append({"index": index, "noun": noun, "plural": plural, "source": source})
    Image.fromarray(sheet).save(assets / "icons.png", optimize=True)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in table)
    (assets / "icons.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
