"""Tokens a second of training, beside transformers' Trainer: same model, samples, loss and precision, one run.

    python benchmarks/training.py [--model nano] [--rounds 5] [--steps 6] [--documents 64]

Both train nano's language model, or one of other sizes with random weights, on drawings and conversations of the icon
world, with AdamW in float32 (bfloat16 where it is fast). The Trainer gets transformers' own Emu3, and batches padded on
the right; ours gets rows of packed samples, so many that both steps have the same samples. What counts are tokens that
are no padding. The two take turns; the ratio is of the medians.
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.models.emu3 import Emu3ForCausalLM as TheirModel
from transformers.models.emu3 import Emu3TextConfig as TheirConfig

from emu3.checkpoints import resolve
from emu3.checkpoints.load import load_model, load_processor
from emu3.configuration import Emu3TextConfig
from emu3.icons.sequences import SceneSource, samples_of
from emu3.modeling.text import Emu3ForCausalLM
from emu3.training.language import LanguageRecipe, learning_rates, make_optimizers
from emu3.training.loop import run_loop
from emu3.training.machine import computes_in
from emu3.training.objective import NextTokenLoss, pack
from emu3.training.sequences import SequenceBuilder, Weights

SIZES = {
    "nano": {},
    "wide": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8},
}


def sequences(count):
    """Samples of the icon world as tokens, of three sizes of pictures; half are drawings."""
    folder = resolve("nano")
    model, processor = load_model(folder), load_processor(folder)
    builder = SequenceBuilder(processor, model.model.vocabulary, Weights(draw=1.0))
    found = []
    for number, (height, width) in enumerate(((48, 48), (32, 32), (40, 56))):
        source = SceneSource(seed=number, count=-(-count // 6), height=height, width=width, full_captions=0.5)
        pixels = torch.cat([source.pictures(start) for start in range(0, source.count, 64)])
        with torch.no_grad():
            latents = model.model.vqmodel.latents(pixels.movedim(-1, 1) / 127.5 - 1)[1]
            codes = model.model.vqmodel.quantize(latents)[:, 0].numpy()
        found += [builder.build(sample) for each in samples_of(source, codes, 4, 1) for sample in each]
    order = np.random.default_rng(0).permutation(len(found))[:count]
    return [found[index] for index in order], model, builder.vocabulary.pad


class Documents(Dataset):
    """Samples for the Trainer: ids and labels, -100 where a token does not count."""

    def __init__(self, found):
        self.found = found

    def __len__(self):
        return len(self.found)

    def __getitem__(self, index):
        each = self.found[index]
        return {"ids": each.ids, "labels": np.where(each.weights > 0, each.ids, -100)}


def collate(batch, pad):
    longest = max(len(each["ids"]) for each in batch)

    def padded(rows, fill):
        return torch.from_numpy(np.stack([np.pad(row, (0, longest - len(row)), constant_values=fill) for row in rows]))

    ids, labels = padded([each["ids"] for each in batch], pad), padded([each["labels"] for each in batch], -100)
    attended = padded([np.ones_like(each["ids"]) for each in batch], 0)
    return {"input_ids": ids, "labels": labels, "attention_mask": attended}


class Clock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *arguments, **values):
        self.ends.append(time.perf_counter())


def by_trainer(config, weights, found, pad, documents, steps, folder):
    model = TheirModel(TheirConfig(**config))
    model.load_state_dict(weights)
    half = computes_in() is torch.bfloat16
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=documents,
        max_steps=steps + 1,
        bf16=half,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        learning_rate=1e-4,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        lr_scheduler_type="constant",
    )
    clock = Clock()
    order = torch.utils.data.SequentialSampler

    class InOrder(Trainer):
        def _get_train_sampler(self, *arguments):
            return order(self.train_dataset)

    trainer = InOrder(
        model, arguments, train_dataset=Documents(found), data_collator=partial(collate, pad=pad), callbacks=[clock]
    )
    trainer.train()
    return clock.ends[-1] - clock.ends[0]


class Ours(NextTokenLoss):
    """Notes when each step begins."""

    def __init__(self, model):
        super().__init__(model)
        self.begins = []

    def forward(self, row):
        self.begins.append(time.perf_counter())
        return super().forward(row)


def make_row(found, documents, pad, step, part):
    own = found[step * documents : (step + 1) * documents]
    return pack(own, -(-sum(map(len, own)) // 64) * 64, pad)


def by_us(config, weights, found, pad, documents, steps, folder):
    model = Emu3ForCausalLM(Emu3TextConfig(**config))
    model.load_state_dict(weights)
    recipe = LanguageRecipe(data=(), steps=steps + 2, learning_rate=1e-4, warmup=0, report_every=1000, save_every=1000)
    objective = Ours(model)
    rates, rows = partial(learning_rates, recipe), partial(make_row, found, documents, pad)
    run_loop(recipe, folder, objective, partial(make_optimizers, recipe), rates, rows, "tokens")
    return objective.begins[-1] - objective.begins[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="nano")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--documents", type=int, default=64)
    asked = parser.parse_args()
    found, nano, pad = sequences(asked.documents * (asked.steps + 2))
    config = nano.config.text_config.to_dict() | SIZES[asked.model]
    config = {name: config[name] for name in Emu3TextConfig.__annotations__ if name in config} | {"pad_token_id": pad}
    torch.manual_seed(0)
    weights = Emu3ForCausalLM(Emu3TextConfig(**config)).state_dict()
    used = found[asked.documents : asked.documents * (asked.steps + 1)]  # the first step warms up
    tokens = sum(map(len, used))
    seconds = {by_trainer: [], by_us: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(asked.rounds):
            for train, times in seconds.items():
                took = train(config, weights, found, pad, asked.documents, asked.steps, Path(folder) / f"{number}")
                times.append(took)
    theirs, ours = (tokens / statistics.median(times) for times in seconds.values())
    threads, dtype = torch.get_num_threads(), str(computes_in()).removeprefix("torch.")
    size = sum(each.numel() for each in weights.values())
    print(f"{asked.model}: {size / 1e6:.1f} M weights, {asked.documents} samples a step, {threads} threads, {dtype}")
    print(f"transformers' Trainer {theirs:,.0f} tokens/s, emu3 {ours:,.0f} tokens/s: {ours / theirs:.2f} times")


if __name__ == "__main__":
    main()
