"""Makes what the README shows of every direction: docs/directions/*.png and *.gif, four times as large.

python docs/directions.py
"""

from pathlib import Path

import numpy as np
from PIL import Image

from emu3 import Emu3Pipeline
from emu3.clips import Clip

FOLDER = Path(__file__).parent / "directions"
SCALE = 4


def enlarge(picture: Image.Image) -> Image.Image:
    """Without smoothing."""
    return picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST)


def save(made: Image.Image | Clip, name: str) -> None:
    """As docs/directions/NAME.png or .gif."""
    if isinstance(made, Clip):
        frames = np.stack([np.asarray(enlarge(each)) for each in made.pictures])
        Clip(frames, made.frames_per_second).save(FOLDER / f"{name}.gif")
    else:
        enlarge(made).save(FOLDER / f"{name}.png")


def main() -> None:
    """All of them."""
    FOLDER.mkdir(exist_ok=True)
    nano = Emu3Pipeline.from_pretrained("nano")
    cat = nano.image("a photo of a red cat and a blue tree", seed=1)[0]
    save(cat, "image")
    print(nano.chat("Describe the picture.", [cat]))
    green = nano.edit(cat, "make the cat green", seed=0)[0]
    save(green, "edit")
    print(nano.chat([("What changed?", [cat, green])])[0])
    mask = np.zeros((48, 48), np.uint8)
    mask[16:] = 255
    save(nano.complete(cat, "a photo of a red cat and a pink moon", mask=mask, seed=1)[0], "mask")
    dog = nano.video("a clip of a red dog moving left beside a blue car", seed=0)[0]
    save(dog, "video")
    print(nano.chat("Describe the clip.", [dog]))
    save(nano.video("a clip of a red dog and a blue car crossing", seed=2)[0], "crossing")
    save(nano.extend(dog, "a clip of a red dog moving left beside a blue car", frames=4, seed=0), "extend")
    still = nano.image("a photo of a pink moon", seed=4)[0]
    save(nano.extend(still, "a clip of a pink moon moving down", frames=8, seed=0), "animate")
    told = nano.tell("Tell a story about a red dog.", seed=0)
    pictures = [enlarge(part) for part in told if not isinstance(part, str)]
    row = Image.new("RGB", (sum(each.width + 8 for each in pictures) - 8, pictures[0].height), "white")
    for number, picture in enumerate(pictures):
        row.paste(picture, (number * (picture.width + 8), 0))
    row.save(FOLDER / "story.png")
    print([part for part in told if isinstance(part, str)])


if __name__ == "__main__":
    main()
