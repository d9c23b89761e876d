"""Pairs for DPO: of drawings of the same words, one that is right to the letter and one that is not.

    python recipes/nano/make_pairs.py runs/nano-pairs
    emu3 train recipes/nano/pairs.toml

The checkpoint draws 8 pictures of each prompt at a scale of 3 without a floor, where it errs most often. Prompts come
from the training scenes.
"""

import argparse
from pathlib import Path

import numpy as np
from rich.progress import track

from emu3.icons.captions import caption
from emu3.icons.rewards import strict
from emu3.icons.scenes import Task, sample_scene
from emu3.pipeline import Emu3Pipeline
from emu3.segments import Visual
from emu3.training.dpo import Pair, write_pairs

TASKS: tuple[Task, ...] = ("two_object", "position", "color_attribution", "two_object", "counting", "colors")
PROMPTS_AT_ONCE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--prompts", type=int, default=800)
    parser.add_argument("--pictures", type=int, default=8, help="of each prompt")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    nano = Emu3Pipeline.from_pretrained(asked.model)
    rng = np.random.default_rng(asked.seed)
    pairs: list[Pair] = []
    for start in track(range(0, asked.prompts, PROMPTS_AT_ONCE), description="drawing"):
        tasks = [TASKS[number % len(TASKS)] for number in range(start, min(start + PROMPTS_AT_ONCE, asked.prompts))]
        prompts = [caption(sample_scene(task, rng, "train"), task, colored=bool(rng.integers(2))) for task in tasks]
        words = [prompt for prompt in prompts for _ in range(asked.pictures)]
        seed = asked.seed + start * asked.pictures
        requests = nano.draw_requests(words, seed=seed, guidance_scale=3, guidance_floor=0, decoding="predictive")
        results = nano.results(requests)
        for place, prompt in enumerate(prompts):
            own = results[place * asked.pictures : (place + 1) * asked.pictures]
            right = [each for each in own if strict(prompt, each.output)]
            wrong = [each for each in own if not strict(prompt, each.output)]
            for number, (better, worse) in enumerate(zip(right, wrong, strict=False)):
                visuals = (Visual(np.asarray(each.codes_HW)[None]) for each in (better, worse))
                pairs.append(Pair(f"{start + place}-{number}", prompt, *visuals))
    if not pairs:
        raise SystemExit("every prompt was drawn right each time, or wrong each time; ask for more --prompts")
    asked.folder.mkdir(parents=True, exist_ok=True)
    write_pairs(asked.folder, pairs, nano.model.model.vqmodel)
    print(f"{asked.folder}: {len(pairs)} pairs of {len({pair.prompt for pair in pairs})} prompts")


if __name__ == "__main__":
    main()
