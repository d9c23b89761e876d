"""How much a checkpoint's pictures of the same words differ, beside the training scenes: a table.

    python benchmarks/variety.py nano OTHER --guidance 3 --prompts 24 --pictures 8

Run it before and after a checkpoint learned from rewards: what the words leave open must not shrink.
"""

import argparse
from dataclasses import astuple, fields

import numpy as np

from emu3.icons.captions import caption
from emu3.icons.scenes import sample_scene
from emu3.icons.variety import Seen, Variety
from emu3.pipeline import Emu3Pipeline

TASKS = ("single_object", "two_object", "counting")  # their prompts leave all open but nouns and counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="names or folders")
    parser.add_argument("--guidance", type=float, nargs="+", default=[None], help="scales")
    parser.add_argument("--floor", type=float, help="of guidance; by default, as the scale, the checkpoint's own")
    parser.add_argument("--prompts", type=int, default=24, help="of each kind")
    parser.add_argument("--pictures", type=int, default=8, help="of each prompt")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    names = [field.name.replace("_", " ") for field in fields(Variety)]
    print(f"| | | guidance | {' | '.join(names)} |\n|---|---|---|{'---|' * len(names)}")
    for task in TASKS:
        rng = np.random.default_rng([asked.seed, TASKS.index(task)])
        prompts = [caption(sample_scene(task, rng, "train"), task) for _ in range(asked.prompts)]
        scenes = [[sample_scene(task, rng, "train") for _ in range(asked.pictures)] for _ in prompts]
        # Of scenes only one object counts: their nouns differ.
        same = [[Seen((("noun", *first[1:]),), back) for (first, *_), back in map(Seen.in_scene, g)] for g in scenes]
        print(_row(task, "scenes", None, Variety.of(same)), flush=True)
        for checkpoint in asked.checkpoints:
            pipeline = Emu3Pipeline.from_pretrained(checkpoint)
            for scale in asked.guidance:
                words = [prompt for prompt in prompts for _ in range(asked.pictures)]
                pictures = pipeline.image(words, seed=asked.seed, guidance_scale=scale, guidance_floor=asked.floor)
                seen = [Seen.in_picture(np.asarray(picture)) for picture in pictures]
                groups = [seen[start : start + asked.pictures] for start in range(0, len(seen), asked.pictures)]
                print(_row(task, checkpoint, scale, Variety.of(groups)), flush=True)


def _row(task: str, name: str, scale: float | None, variety: Variety) -> str:
    figures = " | ".join(f"{value:.2f}" for value in astuple(variety))
    return f"| {task.replace('_', ' ')} | {name} | {'' if scale is None else f'{scale:g}'} | {figures} |"


if __name__ == "__main__":
    main()
