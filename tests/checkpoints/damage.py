"""Damages copies of nano and loads them, each in a process of its own: `python damage.py --edits 500 --seed 1`.

An edit is told by its seed and number alone. Prints one line of JSON for each, with what became of it:

    drawn      loaded, and drew a picture and answered a question, or said by ValueError why it does not
    refused    loading raised ValueError, and so did `inspect` or it accepted the copy
    anything else is a fault: another exception, more than --seconds of computing, or more than --megabytes
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEEP = "[" * 100_000 + "]" * 100_000
# As they stand in a file, because some are no JSON, or none that Python would write.
VALUES = (
    *("null", "true", "false", "0", "1", "2", "-1", "1.5", "-0.0", "1e-300", "1000000000", "-1000000000", "1e400"),
    *("9223372036854775808", "1" + "0" * 30, '""', '"x"', '"nan"', '"0"', '"\\u0000"', '"\\ud800"', "NaN", "-Infinity"),
    *("[]", "[0]", "[1, 2, 3]", '["x"]', "[[[[[]]]]]", "{}", '{"x": 1}', '{"0": {"1": [{}]}}', DEEP),
)
_STAND_IN = "@here@"


@dataclass(frozen=True)
class Edit:
    """One file of a copy, and what it holds instead; None removes it."""

    file: str
    what: str
    content: bytes | None


def edits(source: Path, seed: int, count: int) -> Iterator[Edit]:
    """The first `count` edits of a seed; every file of `source` has its turn."""
    files = sorted(file for file in source.iterdir() if file.is_file())
    for number in range(count):
        chance = random.Random(f"{seed}:{number}")
        file = files[number % len(files)]
        yield _edit(file, file.read_bytes(), files, chance)


def _edit(file: Path, content: bytes, files: list[Path], chance: random.Random) -> Edit:
    is_weights = file.suffix == ".safetensors"
    is_json = file.suffix == ".json" or is_weights
    kinds = {"cut": 1, "flip": 2, "whole": 1, "value": 5 * is_json, "drop": is_json, "rename": is_json}
    kind = chance.choices(list(kinds), list(kinds.values()))[0]
    if kind == "cut":
        length = chance.choice([chance.randrange(len(content)), len(content) - 1])
        return Edit(file.name, f"cut to {length}", content[:length])
    if kind == "flip":
        # Of weights the header as often as the numbers, though it is a thousandth of the file.
        end = 8 + int.from_bytes(content[:8], "little") if is_weights and chance.random() < 0.5 else len(content)
        places = sorted(chance.randrange(end) for _ in range(chance.choice([1, 1, 2, 8])))
        changed = bytearray(content)
        for place in places:
            changed[place] ^= 1 << chance.randrange(8)
        return Edit(file.name, f"flipped a bit in bytes {places}", bytes(changed))
    if kind == "whole":
        other = chance.choice([each for each in files if each != file])
        choices: dict[str, bytes | None] = {
            "removed": None,
            "empty": b"",
            "null": b"null",
            "[]": b"[]",
            "{}": b"{}",
            "deep": DEEP.encode(),
            "open": b"[" * 100_000,
            "objects": b'{"a":' * 100_000,
            "noise": chance.randbytes(1000),
            "UTF-16": content[:100_000].decode("latin-1").encode("utf-16"),
            f"{other.name}": other.read_bytes(),
        }
        name = chance.choice(list(choices))
        return Edit(file.name, f"became {name}", choices[name])
    head, body = content, b""
    if is_weights:
        length = int.from_bytes(content[:8], "little")
        head, body = content[8 : 8 + length], content[8 + length :]
    tree = json.loads(head)
    what, text = _edit_tree(tree, kind, chance)
    changed_head = text.encode()
    if is_weights:
        changed_head += b" " * (-len(changed_head) % 8)
        changed_head = len(changed_head).to_bytes(8, "little") + changed_head
    return Edit(file.name, what, changed_head + body)


def _edit_tree(tree: Any, kind: str, chance: random.Random) -> tuple[str, str]:
    """Change one place of a JSON tree: what was done, and the text."""
    holder, path = tree, []
    while True:
        key = chance.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        path.append(key)
        if not isinstance(holder[key], dict | list) or not holder[key] or chance.random() < 0.25:
            break
        holder = holder[key]
    place = ".".join(map(str, path))
    if kind == "drop":
        del holder[path[-1]]
        return f"{place} left out", json.dumps(tree)
    if kind == "rename" and isinstance(holder, dict):
        holder[chance.choice(["x", "", "0", "head_dim", "quantization_config", "\u0000"])] = holder.pop(path[-1])
        return f"{place} renamed to {list(holder)[-1]!r}", json.dumps(tree)
    value = chance.choice(VALUES)
    holder[path[-1]] = _STAND_IN
    return f"{place} = {value:.40}", json.dumps(tree).replace(json.dumps(_STAND_IN), value)


def apply(edit: Edit, source: Path, folder: Path) -> None:
    """A copy of `source` in `folder`, of links but for the edited file."""
    folder.mkdir()
    for file in source.iterdir():
        if file.name != edit.file:
            (folder / file.name).symlink_to(file)
        elif edit.content is not None:
            (folder / file.name).write_bytes(edit.content)


def attempt(folder: Path) -> tuple[str, str, float]:
    """What became of a copy, why, and how long loading computed."""
    from PIL import Image

    from emu3 import Emu3Pipeline
    from emu3.checkpoints.info import inspect

    began = time.process_time()
    try:
        try:
            pipeline = Emu3Pipeline.from_pretrained(folder)
        except ValueError as error:
            refused = str(error)
            stage = "inspect"
            with suppress(ValueError):
                inspect(folder)
            return "refused", refused, time.process_time() - began
        took = time.process_time() - began
        inspect(folder)
        for stage, use in (
            ("draw", lambda: pipeline.image("a red circle", height=8, width=8, temperature=0.0)),
            ("chat", lambda: pipeline.chat(("What?", [Image.new("RGB", (48, 48))]), max_new_tokens=2)),
        ):
            try:
                use()
            except ValueError as error:
                return "drawn", f"{stage}: {error}", took
        return "drawn", "", took
    except BaseException as error:  # a panic of tokenizers is no Exception
        stage = locals().get("stage", "load")
        return f"{type(error).__name__} ({stage})", str(error), time.process_time() - began


def in_own_process(folder: Path, seconds: float, megabytes: int) -> dict[str, Any]:
    """`attempt` in a copy of this process, which ends when it computes or takes too much."""
    read, write = os.pipe()
    began = time.monotonic()
    import torch

    child = os.fork()
    if not child:
        os.close(read)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        # Room for torch's own reservations too; what is taken for good is measured below.
        torch.set_num_threads(1)  # makes the copy's own pool of threads, which threads must not make at once
        limit = pages * resource.getpagesize() + 2 * megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        signal.setitimer(signal.ITIMER_PROF, 2 * seconds)  # loading and use
        signal.alarm(60)
        outcome, why, took = attempt(folder)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        if took > seconds:
            outcome = f"slow ({outcome})"
        if grown > megabytes:
            outcome = f"large ({outcome})"
        found = {"outcome": outcome, "why": why[:600], "seconds": round(took, 3), "megabytes": round(grown)}
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        told = stream.read()
    _, status = os.waitpid(child, 0)
    if told:
        return dict(json.loads(told))
    return {
        "outcome": f"killed by signal {status & 127}",
        "why": "",
        "seconds": time.monotonic() - began,
        "megabytes": 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--edits", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one edit")
    parser.add_argument("--source", type=Path, help="a checkpoint in place of nano")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--megabytes", type=int, default=1024)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # a process with threads cannot be copied
    warnings.simplefilter("ignore")
    from emu3.checkpoints import NANO

    source = arguments.source or NANO
    attempt(source)  # what the first load and the first picture import, they import once
    room = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=room if room.is_dir() else None) as folder:
        for number, edit in enumerate(edits(source, arguments.seed, arguments.edits)):
            if arguments.only not in (None, number):
                continue
            copy = Path(folder) / str(number)
            apply(edit, source, copy)
            found = in_own_process(copy, arguments.seconds, arguments.megabytes)
            shutil.rmtree(copy)
            print(json.dumps({"number": number, "file": edit.file, "edit": edit.what, **found}), flush=True)


if __name__ == "__main__":
    main()
