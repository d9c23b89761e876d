"""What a draft head is worth: forwards and seconds a picture with and without it, the same captions in turn.

    python benchmarks/draft.py nano --captions 102

Each caption is drawn alone, with and without the head, in alternating order. Prints a table and a JSON line: mean
forwards after the prompt, medians of the time and of the processor's time (which other programs disturb less), and how
many pictures differ from those without the head: none by `predictive`, most by `jacobi`, which draws by other numbers.
"""

import argparse
import json
import platform
import time
from statistics import mean, median

import torch

from emu3 import Emu3Pipeline
from emu3.evaluation.machine import processor_name
from emu3.generation.engine import Engine
from emu3.generation.events import Finished, Stepped
from emu3.generation.request import Request
from emu3.icons.prompts import evaluation_prompts
from emu3.icons.scenes import TASKS


def draw(engine: Engine, request: Request) -> tuple[tuple[int, ...], int, float, float]:
    """The ids, forwards after the prompt, seconds, and seconds of the processor."""
    start, used = time.perf_counter(), time.process_time()
    events = list(engine.stream(request))
    seconds, used = time.perf_counter() - start, time.process_time() - used
    (ids,) = [event.ids for event in events if isinstance(event, Finished)]
    return ids, sum(isinstance(event, Stepped) and not event.prefill for event in events), seconds, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--captions", type=int, default=102)
    parser.add_argument("--decoding", nargs="+", default=["predictive", "jacobi"])
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    pipeline = Emu3Pipeline.from_pretrained(arguments.model)
    if pipeline.draft is None:
        raise SystemExit(f"{arguments.model} has no draft head; train one, see recipes/nano/draft.toml")
    each = -(-arguments.captions // len(TASKS))
    prompts = [prompt.prompt for task in TASKS for prompt in evaluation_prompts(task, each, arguments.seed)]
    prompts = prompts[: arguments.captions]
    engines = {
        "without": Engine(pipeline.model, compiled=arguments.compiled),
        "with": Engine(pipeline.model, compiled=arguments.compiled, draft=pipeline.draft),
    }
    rows = []
    for decoding in arguments.decoding:
        requests = pipeline.draw_requests(prompts, seed=arguments.seed, decoding=decoding)
        for engine in engines.values():
            draw(engine, requests[0])  # to warm up
        found: dict[str, list[tuple[tuple[int, ...], int, float, float]]] = {name: [] for name in engines}
        for number, request in enumerate(requests):
            for name in engines if number % 2 == 0 else reversed(engines):
                found[name].append(draw(engines[name], request))
        pairs = zip(found["without"], found["with"], strict=True)
        rows.append(
            {
                "decoding": decoding,
                "forwards": {name: round(mean(one[1] for one in runs), 2) for name, runs in found.items()},
                "milliseconds": {name: round(1e3 * median(one[2] for one in runs), 1) for name, runs in found.items()},
                "processor": {name: round(1e3 * median(one[3] for one in runs), 1) for name, runs in found.items()},
                "differ": sum(one[0] != other[0] for one, other in pairs),
            }
        )
    result = {
        "benchmark": "draft",
        "model": arguments.model,
        "captions": len(prompts),
        "compiled": arguments.compiled,
        "runs": rows,
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(f"{arguments.model}, {len(prompts)} captions, {result['cpu']}, {result['threads']} threads")
    print(f"{'':12}{'forwards':>18}{'milliseconds':>20}{'of the processor':>20}{'pictures differ':>17}")
    for row in rows:
        cells = [f"{row[name]['without']} -> {row[name]['with']}" for name in ("forwards", "milliseconds", "processor")]
        print(f"{row['decoding']:12}{cells[0]:>18}{cells[1]:>20}{cells[2]:>20}{row['differ']:>17}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
