"""Draw 24 captioned pictures of an icon that nano does not know, to fine-tune on.

    npm pack @mdi/svg@7.4.47 && tar xf mdi-svg-7.4.47.tgz && pip install resvg-py==0.5.0
    python recipes/new-noun/make_folder.py package/svg/robot.svg robot red,orange,green,blue,black robots
    emu3 finetune nano --data robots --lora -o mine
    python recipes/new-noun/judge.py package/svg/robot.svg robot red,orange,green,blue,black mine

The folder has 0000.png, 0000.txt and so on: one icon on a plain background, in one of the colours.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from emu3.icons.novel import NovelNoun

sys.path.append(str(Path(__file__).parents[1] / "icons"))
from rasterise import rasterise


def read_noun(svg: Path, noun: str, colors: str) -> NovelNoun:
    """The noun with the glyph of an SVG file, shown in colours given by commas."""
    return NovelNoun(noun, np.float32(rasterise(svg.read_text())) / np.float32(255), tuple(colors.split(",")))


def add_noun_arguments(parser: argparse.ArgumentParser) -> None:
    """What both scripts of this folder are told of the noun."""
    parser.add_argument("svg", type=Path, help="file of the icon")
    parser.add_argument("noun", help="what it is called, in the singular")
    parser.add_argument("colors", help="those of the folder, by commas")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw captioned pictures of an icon that nano does not know.")
    add_noun_arguments(parser)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=24, help="of the pictures")
    parser.add_argument("--seed", type=int, default=0, help="of backgrounds and places")
    asked = parser.parse_args()
    noun = read_noun(asked.svg, asked.noun, asked.colors)
    asked.folder.mkdir(parents=True, exist_ok=True)
    for index, view in enumerate(noun.views(asked.count, asked.seed)):
        Image.fromarray(noun.render(view)).save(asked.folder / f"{index:04d}.png")
        (asked.folder / f"{index:04d}.txt").write_text(noun.caption(view.color) + "\n")


if __name__ == "__main__":
    main()
