"""What guidance does to pictures of nano: how many are right, and where their objects stand.

    python benchmarks/guidance.py                              # about ten minutes on two cores
    python benchmarks/guidance.py --count 10 --settings 1,0,0 2.5,0.05,1

Each setting is a scale, a floor and an agreement, and perhaps a top-k; see `emu3.generation.sampling.Guide`. Drawing is
the share right of the six tasks; heights, in pixels of 48 from above, are of pictures of two objects, as `emu3 eval
--only layout` takes them. Prints a table as it goes, then a line of JSON.
"""

import argparse
import json
from dataclasses import dataclass
from typing import Any

from PIL import Image

from emu3.icons.measures import Run, drawing, layout
from emu3.pipeline import Emu3Pipeline

SETTINGS = ("1,0,0", "1.5,0,0", "3,0,0", "1.5,0.05,0", "2.5,0.05,0", "2.5,0.05,1", "5,0.05,1", "2.5,0.05,1,8")


@dataclass(frozen=True)
class Guided(Run):
    """Draws by one setting."""

    setting: tuple[float, ...] = (1.0, 0.0, 0.0)

    def draw(self, words: Any, **options: Any) -> list[Image.Image]:
        """A picture of each."""
        scale, floor, agreement, *top_k = self.setting
        limits = {"guidance_floor": floor, "guidance_agreement": agreement}
        limits |= {"top_k": int(top_k[0])} if top_k else {}
        return super().draw(words, guidance_scale=scale, **limits, **options)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--count", type=int, default=40, help="prompts of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    asked = parser.parse_args()
    pipeline = Emu3Pipeline.from_pretrained(asked.model)
    found = {}
    print("| scale, floor, agreement, top-k | right | mean height | deviation | in the upper third |")
    print("|---|---|---|---|---|")
    for setting in asked.settings:
        run = Guided(pipeline, asked.count, asked.seed, setting=tuple(float(each) for each in setting.split(",")))
        score = drawing(run).lines[-1].score
        mean, deviation, upper = layout(run).figures[:3]
        if not found:
            data = [figure.others["data"] for figure in (mean, deviation, upper)]
            print(f"| data | | {data[0]:.1f} | {data[1]:.1f} | {data[2]:.2f} |")
        print(
            f"| {setting.replace(',', ', ')} | {score.right} of {score.count} | {mean.value:.1f} "
            f"| {deviation.value:.1f} | {upper.value:.2f} |",
            flush=True,
        )
        found[setting] = [score.right, score.count, mean.value, deviation.value, upper.value]
    print(json.dumps({"benchmark": "guidance", "model": asked.model, "seed": asked.seed, "found": found}))


if __name__ == "__main__":
    main()
