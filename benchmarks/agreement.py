"""How far each way to store nano's layers moves its choices: `python benchmarks/agreement.py [--pictures 60]`.

Pictures are drawn once by the checkpoint as it is, in float32. Then every other way predicts each of their tokens from
those before it (teacher forcing), with the same guidance. Reported for the visual tokens, against float32: how often
the most likely id is the same, how often the same id is drawn with the same random number, and the total variation
distance between the two distributions, which is at most 1.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from emu3 import Emu3Pipeline
from emu3.checkpoints.quantize import quantize
from emu3.generation.events import Finished
from emu3.generation.request import Request
from emu3.generation.sampling import Sampling, choose, guide, probabilities, uniform_noise
from emu3.icons.prompts import evaluation_prompts
from emu3.icons.scenes import TASKS

NANO = Path(__file__).parent.parent / "src/emu3/assets/nano"
WAYS = {
    "bfloat16": {},
    "float16": {},
    "8 bits": {"bits": 8},
    "4 bits, groups of 32": {"bits": 4, "group": 32},
    "4 bits, groups of 128": {"bits": 4, "group": 128},
}


@torch.inference_mode()
def guided_logits(pipeline: Emu3Pipeline, request: Request, ids: tuple[int, ...]) -> Tensor:
    """Of the visual ids, (visual tokens, V), each from the tokens before it."""
    model, sides = pipeline.model, []
    lo, hi = model.model.vocabulary.visual_span
    places = [k for k, id_ in enumerate(ids) if lo <= id_ < hi]
    for prompt in request.prompts:
        inputs = torch.tensor([[*prompt, *ids[:-1]]])
        hidden_SE = model.model.text_model(input_ids=inputs, use_cache=False).last_hidden_state[0, len(prompt) - 1 :]
        sides.append(model.lm_head(hidden_SE[places])[:, lo:hi].float())
    return guide(*sides, 3.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=60)
    count = parser.parse_args().pictures
    exact = Emu3Pipeline.from_pretrained(NANO, dtype="float32")
    sampling = Sampling(top_k=2048)
    prompts = [evaluation_prompts(TASKS[n % len(TASKS)], 1, seed=n)[0].prompt for n in range(count)]
    requests = exact.draw_requests(prompts, seed=0, decoding="raster", guidance_scale=3.0, guidance_floor=0.0)
    pictures = {event.request: event.ids for event in exact.engine.stream(requests) if isinstance(event, Finished)}
    expected = [guided_logits(exact, request, pictures[n]) for n, request in enumerate(requests)]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in WAYS.items():
            source, dtype = NANO, name if not arguments else "float32"
            if arguments:
                source = Path(folder) / name.replace(" ", "-")
                quantize(NANO, source, **arguments)
            pipeline = Emu3Pipeline.from_pretrained(source, dtype=dtype)
            same, drawn, distance = [], [], []
            for n, request in enumerate(requests):
                found, noise = guided_logits(pipeline, request, pictures[n]), uniform_noise(n, len(expected[n]))
                same.append((found.argmax(-1) == expected[n].argmax(-1)).float())
                drawn.append((choose(found, sampling, noise) == choose(expected[n], sampling, noise)).float())
                apart = (probabilities(found, sampling) - probabilities(expected[n], sampling)).abs().sum(-1) / 2
                distance.append(apart)
            values = (float(torch.cat(each).mean()) for each in (same, drawn, distance))
            rows.append(dict(zip(("layers", "same_argmax", "same_draw", "distance"), (name, *values), strict=True)))
    print(f"nano, {count} pictures of {len(expected[0])} visual tokens, guidance 3, against float32")
    print(f"{'layers':24}{'most likely id':>16}{'same draw':>12}{'distance':>10}")
    for row in rows:
        print(f"{row['layers']:24}{row['same_argmax']:>16.2%}{row['same_draw']:>12.2%}{row['distance']:>10.4f}")
    print(json.dumps({"benchmark": "agreement", "pictures": count, "rows": rows}))


if __name__ == "__main__":
    main()
