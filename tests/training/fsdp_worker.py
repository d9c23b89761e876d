"""One process of a distributed run: trains a tiny language model on random rows; the test compares what it leaves.

torchrun --nproc-per-node 2 fsdp_worker.py FOLDER STEPS OPTIMIZER [kill after STEP]
"""

import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from emu3.configuration import Emu3TextConfig
from emu3.modeling.text import Emu3ForCausalLM
from emu3.training import machine
from emu3.training.language import LanguageRecipe, learning_rates, make_optimizers
from emu3.training.loop import Hook, run_loop
from emu3.training.objective import NextTokenLoss, pack
from emu3.training.recipe import exit_at_once, leave_processes
from emu3.training.results import is_first_process, whole_weights
from emu3.training.sequences import TokenSequence


def make_row(step, part):
    rng = np.random.default_rng([step, part])
    sequences = []
    for length in rng.integers(3, 20, size=4):
        weights = rng.choice(np.array([0, 0.5, 1], np.float32), size=length)
        weights[:2] = 0, 1
        sequences.append(TokenSequence(rng.integers(3, 61, size=length), weights, np.ones(length, np.uint8)))
    return pack(sequences, 80, 0, [f"{step}-{part}"])


def stop(step, at):
    if step == at:
        os._exit(9)  # as if it were killed


if __name__ == "__main__":
    folder, steps, optimizer, *kill = sys.argv[1:]
    machine.has_fast_bfloat16 = lambda: False
    torch.manual_seed(0)
    config = Emu3TextConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        pad_token_id=0,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.0,
        initializer_range=0.2,
    )
    objective = NextTokenLoss(Emu3ForCausalLM(config))
    recipe = LanguageRecipe(
        data=(),
        steps=int(steps),
        parts=2,
        optimizer=optimizer,
        learning_rate=3e-3,
        warmup=5,
        report_every=1,
        save_every=20,
    )
    hooks = [Hook(1, partial(stop, at=int(kill[0])))] if kill else []
    run_loop(
        *(recipe, Path(folder), objective, partial(make_optimizers, recipe), partial(learning_rates, recipe)),
        *(make_row, "tokens", hooks),
    )
    weights = whole_weights(objective)
    if is_first_process():
        save_file({name: each.contiguous() for name, each in weights.items()}, Path(folder) / "weights.safetensors")
    leave_processes()
    exit_at_once()
