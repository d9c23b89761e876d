"""How many drawings of one thing are right, in colours that were in training and in others: a row a checkpoint.

    python recipes/codebooks/compare.py runs/codebooks/designed runs/codebooks/learned

The ceiling is the share of true pictures that are right once they are encoded and decoded.
"""

import argparse

from PIL import Image

from emu3.icons.measures import judge_pictures, reconstruct
from emu3.icons.prompts import evaluation_prompts
from emu3.icons.scenes import render
from emu3.pipeline import Emu3Pipeline

SIDE = 32
"""Of the pictures, in pixels."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="folders")
    parser.add_argument("--count", type=int, default=200, help="prompts, of which every second names a held-out pair")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 3.0], help="of guidance")
    asked = parser.parse_args()
    prompts = evaluation_prompts("colors", asked.count, 0, SIDE, SIDE)
    truth = [Image.fromarray(render(prompt.scene)) for prompt in prompts]
    print("| checkpoint | guidance | seen pairs | held-out pairs | ceiling |\n|---|---|---|---|---|")
    for checkpoint in asked.checkpoints:
        pipeline = Emu3Pipeline.from_pretrained(checkpoint)
        ceiling = sum(judge_pictures(prompts, reconstruct(pipeline, truth)))
        for scale in asked.scales:
            words = [prompt.prompt for prompt in prompts]
            pictures = pipeline.image(words, seed=0, height=SIDE, width=SIDE, guidance_scale=scale)
            right: dict[bool, list[bool]] = {False: [], True: []}
            for prompt, fine in zip(prompts, judge_pictures(prompts, pictures), strict=True):
                right[prompt.held_out].append(fine)
            seen, held_out = (f"{sum(each)} of {len(each)}" for each in right.values())
            print(f"| {checkpoint} | {scale:g} | {seen} | {held_out} | {ceiling} of {asked.count} |", flush=True)


if __name__ == "__main__":
    main()
