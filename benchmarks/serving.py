"""What HTTP costs: nano behind `emu3 serve` against its engine alone, with the same requests, in turns.

    python benchmarks/serving.py --clients 64 --seconds 60 --rounds 2

Each client asks for a picture or an answer about one, as `emu3 bench serve` does, and asks again as soon as it has it.
Beside the engine's steps, the engine alone also encodes and decodes the pictures. Of the server, its memory is shown
before, during and after. `OMP_NUM_THREADS` sets the threads of both. Prints a table, then one JSON line.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from emu3.evaluation.load import PROMPTS, QUESTION, SEEDS, LoadReport, measure_load
from emu3.generation.events import Failed, Finished
from emu3.pipeline import Emu3Pipeline


def memory(pid: int) -> float:
    """MB that a process holds."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def measure_server(clients: int, seconds: float) -> tuple[LoadReport, list[float]]:
    """What clients see of a fresh server, and its memory: at first, then ten times, then idle again."""
    server = subprocess.Popen([sys.executable, "-m", "emu3", "serve", "nano", "--port", "0"], stdout=subprocess.PIPE)
    assert server.stdout is not None
    url = server.stdout.readline().decode().strip()
    held = [memory(server.pid)]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(seconds / 10):
            held.append(memory(server.pid))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        return measure_load(url, clients, seconds), held
    finally:
        over.set()
        watching.join()
        held.append(memory(server.pid))
        server.terminate()
        server.wait(60)


def measure_engine(pipeline: Emu3Pipeline, clients: int, seconds: float) -> float:
    """Tokens a second of the engine alone, with as many requests under way."""
    pictures = [(prompt, seed) for prompt in PROMPTS for seed in SEEDS]
    shown = [pipeline.image(prompt, seed=SEEDS[-1])[0] for prompt in PROMPTS]
    chances = [random.Random(seed) for seed in range(clients)]
    engine, under_way = pipeline.engine, {}

    def ask(client: int) -> None:
        if chances[client].choice(("pictures", "chats")) == "pictures":
            prompt, seed = chances[client].choice(pictures)
            (request,) = pipeline.draw_requests(prompt, seed=seed)
        else:
            (asked,) = pipeline.answer_requests(QUESTION, [chances[client].choice(shown)])
            request = pipeline.encode(asked)
        under_way[engine.submit(request)] = client, request

    began, tokens = time.monotonic(), 0
    for client in range(clients):
        ask(client)
    while under_way:
        for event in engine.step():
            if isinstance(event, Failed):
                raise RuntimeError(event.error)
            if isinstance(event, Finished):
                client, request = under_way.pop(event.request)
                pipeline.result(event, request)
                tokens += len(event.ids)
                if time.monotonic() < began + seconds:
                    ask(client)
    return tokens / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    pipeline = Emu3Pipeline.from_pretrained("nano")
    pipeline.engine.for_answers = 8  # as the server has it
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds):
        report, held = measure_server(options.clients, options.seconds)
        alone = measure_engine(pipeline, options.clients, options.seconds)
        served = report.tokens / report.seconds
        print(f"round {number + 1}: server {served:,.0f} tokens/s, engine alone {alone:,.0f}: {served / alone:.2f}")
        print(report.to_table())
        print("memory, MB: " + " ".join(f"{each:.0f}" for each in held), flush=True)
        rounds.append({"server": report.to_dict(), "engine": alone, "ratio": served / alone, "memory": held})
    machine = {"processor": platform.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(
        json.dumps(
            {"benchmark": "serving", "clients": options.clients, **machine, "cores": os.cpu_count(), "rounds": rounds}
        )
    )


if __name__ == "__main__":
    main()
