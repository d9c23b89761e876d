"""A forward of a quantized checkpoint by emu3 against llama.cpp: same weights, same tokens, in turns.

    python benchmarks/whole_size.py whole             # 17.5 GB with random weights; `--layers 2` for a small one
    emu3 quantize whole whole-4 --bits 4
    python benchmarks/llama_cpp.py whole-4 --rounds 5

The checkpoint's language model is written as a GGUF file for llama.cpp (see `llama_cpp_model.py`), which runs in a
process and an environment of its own. That is made at the first time, which compiles llama.cpp for this machine: a C++
compiler, and minutes. Measured are calls of 1, 2 and 16 tokens after a context: one token of one sequence, one of each
of two, and 16 of one. llama.cpp computes the logits of all ids; emu3 those of all, and those of the ids that are legal
in a picture, which is what drawing needs ("emu3 draws"). Asserts that the logits of both agree, as far as each rounds
activations in its own way, and that neither side uses the processor while the other is measured. Prints a table, then
one JSON line.

`--peer-ids pictures` gives llama.cpp a model that has no other ids than those of pictures, so that both heads do the
same work. Nobody would run it so, but it compares the layers.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import platform
import subprocess
import sys
import time
import venv
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from llama_cpp_model import write_gguf

from emu3.checkpoints.config import vocabulary_of
from emu3.checkpoints.load import load_model
from emu3.configuration import Emu3Config
from emu3.evaluation.machine import kernel_of, processor_name, reading
from emu3.generation.grammar import TextGrammar
from emu3.generation.request import GREEDY, Request
from emu3.generation.runtime.runner import ModelRunner
from emu3.generation.sequence import Inputs, Plan, Sequence, Target
from emu3.matrices import Scheme

PACKAGES = ("llama-cpp-python==0.3.36",)
CMAKE_ARGS = "-DLLAVA_BUILD=OFF"  # its models that read pictures are a third of what is compiled
CONTEXT = 100
ROWS = {1: 1, 2: 2, 16: 1}  # tokens of a call: sequences that they belong to
WARM_UP = 1  # calls at the begin of each turn that do not count: the caches hold what the other side left
PAUSE = 0.2  # seconds after which threads that wait for work have gone to sleep
MOST_IDLE = 0.02  # of the time in which the other side is measured
MOST_DIFFERENT = 0.2  # logits, by their norm; those of another model would differ by more than 1


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emu3" / "llama_cpp"


def python_of(environment: Path) -> Path:
    """The Python of an environment with llama.cpp, which is made if it is not there."""
    python = environment / "bin" / "python"
    if not python.exists():
        venv.create(environment, with_pip=True)
    if subprocess.run([python, "-I", "-c", "import llama_cpp"], capture_output=True).returncode:
        print(f"compiling llama.cpp for {environment} takes some minutes", file=sys.stderr)
        install = [python, "-I", "-m", "pip", "install", "--quiet", *PACKAGES]
        subprocess.run(install, check=True, stdout=sys.stderr, env=os.environ | {"CMAKE_ARGS": CMAKE_ARGS})
    return python


class Theirs:
    """llama.cpp in a process of its own."""

    def __init__(self, python: Path, model: Path, threads: int, context: list[int], first: int) -> None:
        self.first = first  # id of ours that is its 0
        # Isolated (-I), because a script's folder comes first where Python looks, and this file is a llama_cpp, too.
        worker = Path(__file__).with_name("llama_cpp_worker.py")
        command = [str(python), "-I", str(worker)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self.ask("load", model=str(model), threads=threads, context=[id_ - first for id_ in context])

    def ask(self, do: str, **values: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **values}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended with status {self.process.wait()}")
        return json.loads(line)

    def call(self, ids: list[int], calls: int) -> list[float]:
        ids = [id_ - self.first for id_ in ids]
        return self.ask("call", ids=ids, sequences=ROWS[len(ids)], calls=calls)

    def logits(self, row: int) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(self.ask("logits", row=row))), dtype=torch.float32)


class Ours:
    """The engine's own forward and draw, without its loop."""

    def __init__(self, folder: Path, context: list[int]) -> None:
        self.model = load_model(folder)
        self.runner, self.length = ModelRunner(self.model, compiled=False), len(context)
        slots = self.length + max(ROWS)
        self.runner.make_room(2, slots, kept=0, most_lanes=2, most_tokens=None)
        request = Request(tuple(context), TextGrammar(self.model.lm_head.out_features, ()))
        self.sequences = [Sequence.begin(request, number, slots + 1) for number in range(2)]
        for lane, sequence in enumerate(self.sequences):
            sequence.lanes[0].index = lane
            with torch.inference_mode():
                self.runner.feed([Inputs(context, list(range(self.length)), [0] * self.length)], [lane])
        self.logits = torch.empty(0)

    @torch.inference_mode()
    def call(self, ids: list[int], calls: int, span: tuple[int, int]) -> list[float]:
        sequences, seconds = ROWS[len(ids)], []
        each = len(ids) // sequences
        slots = list(range(self.length, self.length + each))
        inputs = [Inputs(ids[lane::sequences], slots, [0] * each) for lane in range(sequences)]
        targets = [Target(place, 0.5, span, None, GREEDY, self._keep) for place in range(each)]
        planned: Any = [(self.sequences[n], Plan(None, [inputs[n]], targets)) for n in range(sequences)]  # type: ignore[arg-type]
        for _ in range(calls):
            start = time.perf_counter()
            self.runner.draw(self.runner.feed(inputs), planned)
            seconds.append(time.perf_counter() - start)
        return seconds

    def _keep(self, logits_BV: torch.Tensor, *_: object) -> torch.Tensor:
        """In place of a choice, which llama.cpp does not make either."""
        self.logits = logits_BV
        return logits_BV[:, 0]

    def bytes_read(self, span: tuple[int, int]) -> int:
        """Of weights, in a forward."""
        layers, head = self.model.model.text_model.layers, self.model.lm_head
        in_layers, in_head = (
            sum(each.nbytes for each in (*part.parameters(), *part.buffers())) for part in (layers, head)
        )
        return in_layers + in_head * (span[1] - span[0]) // head.out_features


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of two rows of logits, beside their size. Both sides round activations, each in its own way."""
    return float((ours - theirs).norm() / theirs.norm())


def random_ids(count: int, span: tuple[int, int], seed: int) -> list[int]:
    return torch.randint(*span, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def memory() -> dict[str, int]:
    """Bytes in memory: of the process's own, and of mapped files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: 1024 * int(fields[key].split()[0]) for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))}


def measure(
    ours: Ours, theirs: Theirs, spans: dict[str, tuple[int, int]], peer_ids: str, rounds: int, calls: int
) -> dict[str, Any]:
    ids = {rows: random_ids(rows, spans[peer_ids], seed=rows) for rows in ROWS}
    _, read, read_bytes = reading(torch.device("cpu"))
    seconds: dict[str, dict[int, list[float]]] = {name: {rows: [] for rows in ROWS} for name in ("llama.cpp", *spans)}
    read_seconds: list[float] = []
    busy, used = {"llama.cpp": 0.0, "emu3": 0.0}, {"llama.cpp": 0.0, "emu3": 0.0}  # by the other one
    for number in range(rounds):
        for rows in ROWS:
            for name in seconds if number % 2 == 0 else reversed(seconds):
                time.sleep(PAUSE)
                start, own, other = time.perf_counter(), time.process_time(), theirs.ask("cpu")
                if name == "llama.cpp":
                    found = theirs.call(ids[rows], WARM_UP + calls)
                    used["emu3"] += time.process_time() - own
                else:
                    found = ours.call(ids[rows], WARM_UP + calls, spans[name])
                    used["llama.cpp"] += theirs.ask("cpu") - other
                busy["emu3" if name == "llama.cpp" else "llama.cpp"] += time.perf_counter() - start
                seconds[name][rows] += found[WARM_UP:]
            for _ in range(2):
                start = time.perf_counter()
                read()
                read_seconds.append(time.perf_counter() - start)
    del read  # and the memory that it reads
    idle = {name: used[name] / busy[name] for name in used}
    assert max(idle.values()) < MOST_IDLE, f"a side that waits must not use the processor: {idle}"
    differences = []
    for rows in ROWS:
        theirs.call(ids[rows], 1)
        ours.call(ids[rows], 1, spans[peer_ids])
        # One lane after the other there, one row of the batch after the other here: of one each, the same.
        differences += [difference(ours.logits[row], theirs.logits(row)) for row in range(rows)]
    assert max(differences) < MOST_DIFFERENT, f"the two sides must compute the same: {differences}"
    rounded = {
        name: {rows: [round(each, 5) for each in times] for rows, times in by_rows.items()}
        for name, by_rows in seconds.items()
    }
    return {
        "seconds": rounded,
        "ratios": {
            name: {rows: round(median(seconds["llama.cpp"][rows]) / median(seconds[name][rows]), 3) for rows in ROWS}
            for name in spans
        },
        "bytes": {name: ours.bytes_read(span) for name, span in spans.items()},
        "read_bytes_per_second": round(read_bytes / median(read_seconds)),
        "idle": {name: round(share, 5) for name, share in idle.items()},
        "difference": round(max(differences), 5),
        "memory": {"emu3": memory(), "llama.cpp": theirs.ask("memory")},
    }


def table(result: dict[str, Any]) -> str:
    ids = "all ids" if result["peer_ids"] == "all" else "no ids but those of pictures"
    lines = [
        f"{result['layers']} layers; {result['cpu']}, {result['threads']} threads; torch {result['torch']}, "
        f"llama-cpp-python {result['llama_cpp']}",
        f"llama.cpp: layers: {result['peer_layers']}; head: {result['peer_head']}, {ids}",
        f"emu3: layers: {result['kernels']['layers']}; head: {result['kernels']['head']}",
        f"logits differ by at most {result['difference']:.2%}; memory is read at "
        f"{result['read_bytes_per_second'] / 1e9:.1f} GB/s",
        f"{'':12}{'weights':>10}" + "".join(f"{f'{rows} tokens' if rows > 1 else '1 token':>28}" for rows in ROWS),
    ]
    names = {"llama.cpp": "llama.cpp", "all": "emu3", "pictures": "emu3 draws"}
    for name, label in names.items():
        cells = ""
        for rows in ROWS:
            seconds = median(result["seconds"][name][rows])
            share = result["bytes"][name] / seconds / result["read_bytes_per_second"]
            ratio = f", {result['ratios'][name][rows]:.2f}" if name in result["ratios"] else ""
            cells += f"{f'{1000 * seconds:.1f} ms ({share:.0%}){ratio}':>28}"
        lines.append(f"{label:12}{result['bytes'][name] / 1e9:>7.2f} GB{cells}")
    for name, values in result["memory"].items():
        own, mapped = (values[kind] / 1e9 for kind in ("own", "mapped"))
        lines.append(f"{name}: {own:.2f} GB of memory, and {mapped:.2f} GB of files mapped")
    lines.append("in brackets the share of the memory's speed; then the ratio to llama.cpp")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a folder that `emu3 quantize` wrote")
    parser.add_argument("--environment", type=Path, default=cache_folder(), help="of llama.cpp; made if not there")
    parser.add_argument("--peer-ids", choices=["all", "pictures"], default="all", help="that llama.cpp's model has")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each side")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=3, help="of each kind in a round")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    file = arguments.checkpoint / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    if Scheme.of(config.get("quantization_config")) is None:
        parser.error(f"{arguments.checkpoint} is no folder that `emu3 quantize` wrote")
    spans = {
        "all": (0, config["text_config"]["vocab_size"]),
        "pictures": vocabulary_of(Emu3Config(**config)).visual_span,
    }
    span = spans[arguments.peer_ids]
    context = random_ids(CONTEXT, span, seed=0)
    python = python_of(arguments.environment)
    with TemporaryDirectory(dir=arguments.environment) as folder:
        file = Path(folder) / "model.gguf"
        written = write_gguf(arguments.checkpoint, file, span)
        theirs = Theirs(python, file, arguments.threads, context, span[0])
        ours = Ours(arguments.checkpoint, context)
        found = measure(ours, theirs, spans, arguments.peer_ids, arguments.rounds, arguments.calls)
        theirs.process.stdin.close()  # type: ignore[union-attr]
        theirs.process.wait()
    found["bytes"] = {"llama.cpp": written.layer_bytes + written.head_bytes, **found["bytes"]}
    layer = ours.model.model.text_model.layers[0].mlp.down_proj
    result = {
        "benchmark": "llama_cpp",
        "layers": config["text_config"]["num_hidden_layers"],
        "bits": config["quantization_config"]["bits"],
        "group": config["quantization_config"]["group_size"],
        "kernels": {"layers": kernel_of(layer), "head": kernel_of(ours.model.lm_head, is_head=True)},
        "peer_layers": written.layers,
        "peer_head": written.head,
        "peer_ids": arguments.peer_ids,
        "context": CONTEXT,
        **found,
        "peer_buffers": theirs.about["buffers"],
        "peer_system": theirs.about["system"],
        "llama_cpp": theirs.about["version"],
        "cpu": processor_name(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(table(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
