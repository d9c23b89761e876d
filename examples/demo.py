"""Draw pictures from words, then describe one of them and answer a question about it: `make demo`."""

from __future__ import annotations

from pathlib import Path

from emu3 import Emu3Pipeline
from emu3.sheet import contact_sheet

FOLDER = Path("out/demo")
PROMPTS = (
    "a photo of a bench",
    "a photo of a purple cat",
    "a photo of two cars",
    "a photo of a dog right of a chair",
    "a photo of a red car and a blue tree",
    "a photo of a green umbrella",
)


def main() -> None:
    pipeline = Emu3Pipeline.from_pretrained("nano")
    pictures = pipeline.image(list(PROMPTS), seed=0)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for number, (prompt, picture) in enumerate(zip(PROMPTS, pictures, strict=True), start=1):
        path = FOLDER / f"{number}.png"
        picture.save(path)
        print(f"{path}  {prompt}")
    sheet = FOLDER / "contact-sheet.png"
    contact_sheet(pictures, PROMPTS).save(sheet)
    print(f"{sheet}  all of them")

    looked_at = pictures[1]
    print(f"\nnano looks at {FOLDER / '2.png'}:")
    for request in ("Describe the picture.", "What color is the cat?"):
        print(f"  {request}  ->  {pipeline.chat(request, [looked_at])}")


if __name__ == "__main__":
    main()
