"""Draw pictures from words, then describe one of them and answer a question about it: `make demo`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from emu3 import Emu3Pipeline

FOLDER = Path("out/demo")
PROMPTS = (
    "a photo of a bench",
    "a photo of a purple cat",
    "a photo of two cars",
    "a photo of a dog right of a chair",
    "a photo of a red car and a blue tree",
    "a photo of a green umbrella",
)
SCALE = 4
MARGIN = 8
CAPTION_HEIGHT = 20


def contact_sheet(pictures: list[Image.Image], captions: tuple[str, ...], columns: int = 3) -> Image.Image:
    """Pictures of one size, enlarged, in rows, each above its caption."""
    width, height = (side * SCALE for side in pictures[0].size)
    cell_width, cell_height = width + MARGIN, height + CAPTION_HEIGHT + MARGIN
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = MARGIN + index % columns * cell_width
        top = MARGIN + index // columns * cell_height
        sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        pen.text((left, top + height + 4), caption, fill="black")
    return sheet


def main() -> None:
    pipeline = Emu3Pipeline.from_pretrained("nano")
    pictures = pipeline.image(list(PROMPTS), seed=0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for number, (prompt, picture) in enumerate(zip(PROMPTS, pictures, strict=True), start=1):
        path = FOLDER / f"{number}.png"
        picture.save(path)
        print(f"{path}  {prompt}")
    sheet_path = FOLDER / "contact-sheet.png"
    contact_sheet(pictures, PROMPTS).save(sheet_path)
    print(f"{sheet_path}  all of them")

    looked_at = pictures[1]
    print(f"\nnano looks at {FOLDER / '2.png'}:")
    for request in ("Describe the picture.", "What color is the cat?"):
        print(f"  {request}  ->  {pipeline.chat((request, [looked_at]))}")


if __name__ == "__main__":
    main()
