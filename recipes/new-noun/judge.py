"""Draw a noun that a checkpoint learned from `make_folder.py`, in colours that were left out, and count what is right.

    python recipes/new-noun/judge.py package/svg/robot.svg robot red,orange,green,blue,black mine

Prints the ceiling too: how many of the true pictures are right after nano's vision tokenizer has encoded and decoded
them. Its codebook is made for the forty nouns, and about three icons in four do not come through it unharmed.
"""

import argparse
import json
from pathlib import Path

from make_folder import add_noun_arguments, read_noun

from emu3.icons.novel import judge_checkpoint, measure_ceiling
from emu3.pipeline import Emu3Pipeline
from emu3.sheet import contact_sheet


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge a noun that a checkpoint learned, in colours it was not shown.")
    add_noun_arguments(parser)
    parser.add_argument("checkpoint", help="folder or name")
    parser.add_argument("--count", type=int, default=50, help="of the prompts")
    parser.add_argument("--seed", type=int, default=0, help="of the drawings")
    parser.add_argument("-o", "--output", type=Path, help="a .png file for the drawings")
    asked = parser.parse_args()
    noun = read_noun(asked.svg, asked.noun, asked.colors)
    pipeline = Emu3Pipeline.from_pretrained(asked.checkpoint)
    prompts, pictures, right = judge_checkpoint(pipeline, noun, asked.count, asked.seed)
    if asked.output is not None:
        contact_sheet(pictures, prompts, 10, right).save(asked.output)
    ceiling = measure_ceiling(pipeline, noun, asked.count, asked.seed)
    print(json.dumps({"noun": noun.noun, "right": sum(right), "ceiling": sum(ceiling), "count": asked.count}))


if __name__ == "__main__":
    main()
