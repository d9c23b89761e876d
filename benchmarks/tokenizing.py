"""Speed of `emu3 tokenize` against a plain loop over transformers' classes: same weights, same pictures, same run.

    python benchmarks/pictures.py /tmp/pictures --count 20000
    python benchmarks/tokenizing.py /tmp/pictures --peer 500
    python benchmarks/tokenizing.py /tmp/pictures --peer 100 --tokenizer documented --area 16384

The loop opens one picture after the other with Pillow, and has transformers' `Emu3ImageProcessor` and `Emu3VQVAE` in
PyTorch's default number of threads. It does `--peer` pictures, spread evenly over the folder, half of them before and
half after `emu3 tokenize` does all. Its time starts when its first picture is done; that of `emu3 tokenize` when its
command has started, and its processes start within it. `ratio_with_start` counts the start of the command, too, which
takes 5 seconds.

Prints one JSON line: pictures a second of both, and their ratio. What else runs on the machine slows many threads down
more than single ones, so there is a second ratio that does not depend on it: the seconds of processor a picture, of the
loop with one thread to those of `emu3 tokenize`. It is what would be left if the loop's threads cost nothing.

Fails where codes differ other than by rounding: one in 10,000 may, of pictures that neither side resizes.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

from emu3.checkpoints import NANO
from emu3.checkpoints.vision import load_vision_tokenizer, read_picture_settings_of
from emu3.configuration import Emu3VQVAEConfig
from emu3.data.shards import open_shards
from emu3.evaluation.machine import processor_name
from emu3.modeling.vision import Emu3VQVAE

LIMIT = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", type=int, default=500, help="pictures that the plain loop does")
    parser.add_argument("--tokenizer", choices=("nano", "documented"), default="nano")
    parser.add_argument("--area", type=int, default=2304)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--loop", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loop:
        print(json.dumps(run_loop(Path(arguments.loop[0]), json.loads(arguments.loop[1]), arguments.area)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(compare(arguments, Path(scratch))))


def compare(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    write_tokenizer(arguments.tokenizer, scratch / "tokenizer")
    pictures = sorted(str(path) for path in arguments.folder.iterdir() if path.suffix in (".png", ".jpg"))
    chosen = pictures[:: max(1, len(pictures) // arguments.peer)][: arguments.peer]
    middle = len(chosen) // 2
    loops = [start_loop(arguments, scratch, chosen[:middle])]
    command = ["tokenize", str(arguments.folder), str(scratch / "out"), "--model", str(scratch / "tokenizer"), "--json"]
    command += ["--area", str(arguments.area), "--processes", str(arguments.processes)]
    before, start = processor_seconds(), time.perf_counter()
    output = subprocess.run([sys.executable, "-m", "emu3", *command], check=True, capture_output=True, text=True).stdout
    seconds, processor = time.perf_counter() - start, processor_seconds() - before
    report = json.loads(output)
    loops.append(start_loop(arguments, scratch, chosen[middle:]))
    single = start_loop(arguments, scratch, chosen[: max(2, middle)], {"OMP_NUM_THREADS": "1"})
    single_processor = single["processor_seconds"] / single["pictures"]
    done = sum(each["pictures"] for each in loops)
    peer_rate = done / sum(each["seconds"] for each in loops)
    peer_processor = sum(each["processor_seconds"] for each in loops) / done
    compared, differing = compare_codes(scratch / "out", {k: v for each in loops for k, v in each["codes"].items()})
    if differing > LIMIT * compared:
        raise RuntimeError(f"{differing} of {compared} codes differ, more than rounding explains")
    return {
        "benchmark": "tokenize",
        "tokenizer": arguments.tokenizer,
        "area": arguments.area,
        "pictures": report["pictures"],
        "broken": len(report["broken"]),
        "codes_in_use": report["codes_in_use"],
        "emu3_seconds": report["seconds"],
        "emu3_seconds_with_start": round(seconds, 1),
        "emu3_pictures_per_second": report["pictures_per_second"],
        "transformers_pictures": done,
        "transformers_pictures_per_second": round(peer_rate, 1),
        "ratio": round(report["pictures_per_second"] / peer_rate, 2),
        "ratio_with_start": round(report["pictures"] / seconds / peer_rate, 2),
        "processor_ratio": round(single_processor / (processor / report["pictures"]), 2),
        "emu3_processor_milliseconds": round(1000 * processor / report["pictures"], 1),
        "transformers_processor_milliseconds": round(1000 * peer_processor, 1),
        "transformers_processor_milliseconds_of_one_thread": round(1000 * single_processor, 1),
        "codes_compared": compared,
        "codes_differing": differing,
        "processes": arguments.processes,
        "load_before": round(os.getloadavg()[0], 1),
        "cpu": processor_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def write_tokenizer(name: str, folder: Path) -> None:
    """nano's vision tokenizer in a folder of its own; or a random one as documented, with fewer channels."""
    if name == "nano":
        network = load_vision_tokenizer(NANO)
    else:
        torch.manual_seed(0)
        network = Emu3VQVAE(Emu3VQVAEConfig(base_channels=64, hidden_size=256))
        # A fresh codebook is a dot far from the latents, where rounding decides which code is nearest; so spread it.
        with torch.no_grad():
            latents = network.latents(torch.rand(1, 3, 64, 64) * 2 - 1)[1]
            codebook = network.quantize.embedding.weight
            codebook.normal_(0, 4).mul_(latents.std((0, 1, 3, 4))).add_(latents.mean((0, 1, 3, 4)))
    network.save_pretrained(folder)


def processor_seconds() -> float:
    """Of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def start_loop(
    arguments: argparse.Namespace, scratch: Path, pictures: list[str], more: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The plain loop in its own process; in PyTorch's default threads, unless `more` of the environment tells."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | dict(more or {})
    command = [sys.executable, __file__, str(arguments.folder), "--area", str(arguments.area), "--loop"]
    command += [str(scratch / "tokenizer"), json.dumps(pictures)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return dict(json.loads(done))


@torch.no_grad()
def run_loop(folder: Path, pictures: list[str], area: int) -> dict[str, Any]:
    """What a person would write with transformers."""
    config = json.loads((folder / "config.json").read_text())
    network = transformers.Emu3VQVAE(transformers.Emu3VQVAEConfig(**config)).eval()
    network.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    factor = read_picture_settings_of(folder).spatial_factor
    processor = transformers.Emu3ImageProcessor(
        image_mean=[0.5] * 3, image_std=[0.5] * 3, spatial_factor=factor, min_pixels=area, max_pixels=area
    )
    codes: dict[str, Any] = {}
    count, start, used = 0, 0.0, 0.0
    for name in pictures:
        try:
            with Image.open(name) as opened:
                picture = opened.convert("RGB")
            inputs = processor(picture, return_tensors="pt")
        except (OSError, ValueError):
            continue
        found = network.encode(inputs["pixel_values"].float(), inputs["image_sizes"]).image_tokens[0]
        if not start:  # the first is not counted: it warms up
            start, used = time.perf_counter(), time.process_time()
            continue
        count += 1
        if picture.size == tuple(inputs["image_sizes"][0].tolist()[::-1]):
            codes[Path(name).stem] = found.tolist()
    seconds = {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - used}
    return {"pictures": count, **seconds, "codes": codes}


def compare_codes(folder: Path, codes: dict[str, Any]) -> tuple[int, int]:
    """How many codes of pictures that neither side resized were compared, and how many of them differ."""
    compared = differing = 0
    for shard in open_shards(folder):
        for index, key in enumerate(shard.keys):
            if key not in codes:
                continue
            (own,) = (part.content.codes_THW[0] for part in shard[index].parts if part.role == "draw")
            theirs = np.array(codes[key])
            if own.shape == theirs.shape:
                compared, differing = compared + own.size, differing + int((own != theirs).sum())
    return compared, differing


if __name__ == "__main__":
    main()
