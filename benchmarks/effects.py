"""What guidance, top-k, fine-tuning and preferences do to drawings of nano's world: a row for each way to draw.

    python benchmarks/effects.py nano                          # settings of guidance; about ten minutes on two cores
    python benchmarks/effects.py nano mine --settings own 3,0,0 --seeds 100 200 --count 50

A setting is a scale, a floor and an agreement, and perhaps a top-k; see `emu3.generation.sampling.Guide`. "own" is the
checkpoint's. Right are drawings of the six tasks by GenEval's rule; to the letter, those that show nothing else.
Heights, in pixels of 48 from above, are of pictures of two objects, as `emu3 eval --only layout` takes them. Prints a
table as it goes, then a line of JSON.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from emu3.icons.measures import Run, judge_pictures, layout
from emu3.icons.prompts import evaluation_prompts
from emu3.icons.rewards import strict
from emu3.icons.scenes import TASKS
from emu3.pipeline import Emu3Pipeline

SETTINGS = ("1,0,0", "1.5,0,0", "3,0,0", "1.5,0.05,0", "2.5,0.05,0", "2.5,0.05,1", "5,0.05,1", "2.5,0.05,1,8")


@dataclass(frozen=True)
class Guided(Run):
    """Draws by a setting."""

    options: Mapping[str, float] = field(default_factory=dict)

    def draw(self, words: Sequence[str], **options: Any) -> list[Image.Image]:
        """A picture of each."""
        return super().draw(words, **self.options, **options)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="names or folders")
    parser.add_argument("--count", type=int, default=40, help="prompts of each task and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    asked = parser.parse_args()
    found: list[dict[str, str]] = []
    print("| | scale, floor, agreement, top-k | right | held-out pairs | to the letter | height | deviation |")
    print("|---|---|---|---|---|---|---|")
    for checkpoint in asked.checkpoints:
        pipeline = Emu3Pipeline.from_pretrained(checkpoint)
        for setting in asked.settings:
            runs = [Guided(pipeline, asked.count, seed, options=options_of(setting)) for seed in asked.seeds]
            right, held_out, to_the_letter = judged(runs)
            height, deviation = layout(runs[0]).figures[:2]
            row = {
                "right": f"{sum(right)} of {len(right)}",
                "held_out": f"{sum(held_out)} of {len(held_out)}",
                "to_the_letter": f"{sum(to_the_letter)} of {len(right)}",
                "height": f"{height.value:.1f}",
                "deviation": f"{deviation.value:.1f}",
            }
            if not found:
                data = [f"{figure.others['data']:.1f}" for figure in (height, deviation)]
                print(f"| data | | | | | {' | '.join(data)} |")
            print(f"| {checkpoint} | {setting.replace(',', ', ')} | {' | '.join(row.values())} |", flush=True)
            found.append({"checkpoint": checkpoint, "setting": setting, **row})
    print(json.dumps({"benchmark": "effects", "seeds": asked.seeds, "found": found}))


def options_of(setting: str) -> dict[str, float]:
    """The options of drawing that a setting names."""
    if setting == "own":
        return {}
    scale, floor, agreement, *top_k = setting.split(",")
    guidance = {"guidance_scale": float(scale), "guidance_floor": float(floor), "guidance_agreement": float(agreement)}
    return guidance | ({"top_k": int(top_k[0])} if top_k else {})


def judged(runs: Sequence[Run]) -> tuple[list[bool], list[bool], list[bool]]:
    """What is right by GenEval's rule, of all and of held-out pairs, and what is right to the letter."""
    right, held_out, to_the_letter = [], [], []
    for run in runs:
        for task in TASKS:
            prompts = evaluation_prompts(task, run.count, run.seed)
            words = [prompt.prompt for prompt in prompts]
            pictures = run.draw(words)
            fine = judge_pictures(prompts, pictures)
            right += fine
            held_out += [each for each, prompt in zip(fine, prompts, strict=True) if prompt.held_out]
            to_the_letter += [strict(*each) == 1 for each in zip(words, pictures, strict=True)]
    return right, held_out, to_the_letter


if __name__ == "__main__":
    main()
