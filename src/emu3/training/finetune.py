"""Fine-tuning in one command: from a checkpoint and a folder of people's data to what they can draw with.

    data --tokenize--> OUT/data     the checkpoint's own drawings --> OUT/replay     both --train--> OUT

Every choice is made from the number of samples, their tokens and the model's size, is told before training starts, and
is written to OUT/recipe.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from emu3.checkpoints import resolve
from emu3.checkpoints.load import load_model, load_processor
from emu3.checkpoints.memory import free_memory
from emu3.data.job import tokenize
from emu3.data.shards import Shard, open_shards, shard_name, write_shard
from emu3.data.sources import open_source
from emu3.layout import ClipText
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.pipeline import Emu3Pipeline
from emu3.segments import Text
from emu3.training.language import FinetuneRecipe, LoraRecipe, MixedShards, finetune, lengths_of, lora
from emu3.training.machine import computes_in, training_device
from emu3.training.plan import Plan, make_plan, plain_time
from emu3.training.replay import make_replay
from emu3.training.sequences import SequenceBuilder, Weights
from emu3.training.state import require_outside, saved_states, step_of

Say = Callable[[str], object]
Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]

RECIPE = "recipe.json"
SMALL = 1024  # width of a model that draws some pictures in seconds

VISITS = 60  # of each sample, where there are few
LEAST_VISITS = 3
SAMPLES_AT_ONCE = 3  # of the data in a step, where there are few
MOST_TOKENS = 8192  # of a row
REPLAYED = 160
REPLAYED_AT_ONCE = 2  # samples of these in a step, for each of the data
LONGEST_CAPTION = 400  # characters of those that pictures are drawn for
HELD = 4.0  # how much more than others counts a token at which the checkpoint is held to itself
WIDEST = 4096  # width of the model that learning rates are known for
RATES = {"lora": 2e-4, "all": 2e-5}


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a user may choose; None: it is chosen for him.

    Attributes:
        with_adapters: whether to train adapters, which leaves the checkpoint as it is.
        task: which of the data count.
        steps, learning_rate, rank: of training.
        replay: pictures that the checkpoint draws by itself, and adapters are held to.
        move: whether something on a plain ground is drawn at another place each time.
        seed: of all.
    """

    with_adapters: bool = False
    task: Literal["draw", "chat", "both"] = "both"
    steps: int | None = None
    learning_rate: float | None = None
    rank: int | None = None
    replay: int | None = None
    move: bool = True
    seed: int = 0


def run(model: str, data: str, folder: Path, wishes: Wishes, say: Say, progress: Progress) -> None:
    """Fine-tunes; leaves a checkpoint, or with adapters an adapter, in the folder. A run that was cut off goes on.

    Args:
        model: name of the checkpoint.
        data: a source, as `emu3.data.sources.open_source` reads it.
        folder: for all that the run makes.
        wishes: what is not to be chosen.
        say: gets the lines that tell what is going on.
        progress: (what) -> a context that gives a function (done, in all).

    Raises:
        ValueError: nothing can be learned from the data, or the machine has too little memory.
    """
    _check_folder(folder, model, data, wishes)
    source = resolve(model)
    loaded, processor = load_model(source), load_processor(source)
    with progress("tokenizing") as show:
        report = tokenize(
            open_source(data), folder / "data", model=source, processes=1, on_progress=lambda p: show(p.done, p.pieces)
        )
    if report.broken:
        say(f"{len(report.broken)} samples cannot be used; {folder / 'data' / 'report.json'} says which and why")
    shards = open_shards(folder / "data")
    builder = SequenceBuilder(processor, loaded.model.vocabulary, clips=ClipText.of(loaded.config))
    lengths = np.concatenate([lengths_of([shard], builder, wishes.task) for shard in shards])
    lengths = lengths[lengths >= 0]
    if not len(lengths):
        raise ValueError(f"{data} holds nothing for task={wishes.task!r}; give other data, or leave --task out")
    context = loaded.model.text_model.config.max_position_embeddings
    if lengths.min() > context:
        raise ValueError(
            f"all {len(lengths)} samples are longer than the context of {context} tokens: the shortest has "
            f"{lengths.min():,}; shorten the texts, or ask for smaller pictures by `emu3 tokenize --area`"
        )
    if (long := int((lengths > context).sum())) > 0:
        say(f"{long} samples are longer than the context of {context} tokens, and left out")
    lengths = lengths[lengths <= context]
    replayed = _replayed(wishes, loaded, lengths)
    if replayed:
        with progress(f"drawing {replayed} pictures of its own") as show:
            _make_replay(Emu3Pipeline(loaded, processor), replayed, wishes.seed, folder / "replay", shards, show)
    recipe = choose(model, loaded, folder, lengths, replayed, wishes, builder)
    need = make_plan(recipe, loaded.model.text_model.config, [1], half=computes_in(recipe) is torch.bfloat16)
    free = free_memory(training_device())
    wordless = sum([part.role for part in each.parts] == ["draw"] for shard in shards for each in shard.outlines())
    for line in describe(recipe, need, lengths, replayed, free, wordless):
        say(line)
    if need.needs[0].bytes > free:
        raise ValueError(
            f"training takes about {need.needs[0].bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; use --lora, or "
            "a machine with more memory (`emu3 train --plan` says what each takes)"
        )
    (folder / RECIPE).write_text(json.dumps(asdict(recipe), indent=2, default=str) + "\n")
    del loaded
    if isinstance(recipe, LoraRecipe):
        lora(recipe, folder)
    else:
        finetune(recipe, folder)


def choose(
    model: str,
    loaded: Emu3ForConditionalGeneration,
    folder: Path,
    lengths: NDArray[Any],
    replayed: int,
    wishes: Wishes,
    builder: SequenceBuilder,
) -> FinetuneRecipe:
    """The recipe for so many samples of these lengths in tokens, and so many replayed pictures."""
    count, mean = len(lengths), float(lengths.mean())
    visits = min(VISITS, max(LEAST_VISITS, 1800 / count))
    at_once = min(64, max(SAMPLES_AT_ONCE, count // 40))
    steps = wishes.steps or max(20, math.ceil(count * visits / at_once))
    data = [MixedShards(path=(folder / "data").resolve(), weight=at_once, moved=wishes.move)]
    tokens = at_once * mean
    if replayed:
        kept, again = open_shards(folder / "replay"), REPLAYED_AT_ONCE * at_once
        data.append(MixedShards(path=(folder / "replay").resolve(), weight=again, held=HELD))
        tokens += again * float(np.mean([len(builder.build(each)) for shard in kept for each in shard.outlines()]))
    rows = max(1, math.ceil(tokens / MOST_TOKENS))
    length = max(64 * math.ceil(tokens / rows / 64), int(lengths.max()))
    width = loaded.model.text_model.config.hidden_size
    rate = RATES["lora" if wishes.with_adapters else "all"] * (WIDEST / width) ** 0.72
    settings: dict[str, Any] = {
        "checkpoint": model,
        "data": tuple(data),
        "task": wishes.task,
        "seed": wishes.seed,
        "steps": steps,
        "parts": rows,
        "length": length,
        "weights": Weights(draw=1.0),
        "null_prompt": 1 / 6,
        "learning_rate": rate if wishes.learning_rate is None else wishes.learning_rate,
        "weight_decay": 0.0,
        "warmup": min(100, max(1, steps // 20)),
        "decay_share": 0.7,
        "report_every": max(1, steps // 30),
        "save_every": max(10, steps // 5),
        "draw_every": max(10, steps // 5),
        "recompute_layers": width >= WIDEST,
    }
    if not wishes.with_adapters:
        return FinetuneRecipe(**settings)
    rank = wishes.rank or 16
    return LoraRecipe(**settings, rank=rank, alpha=float(rank))


def describe(
    recipe: FinetuneRecipe, plan: Plan, lengths: NDArray[Any], replayed: int, free: float, wordless: int = 0
) -> list[str]:
    """What will be done, in a few lines; `wordless` is the number of drawings without a caption."""
    kind = f"adapters of rank {recipe.rank}" if isinstance(recipe, LoraRecipe) else "all weights"
    share = recipe.data[0].weight / sum(each.weight for each in recipe.data)
    visits = recipe.steps * recipe.parts * recipe.length * share / lengths.sum()
    lines = [
        f"{len(lengths)} samples of {lengths.mean():,.0f} tokens; each is seen about {visits:,.0f} times",
        f"{kind} of {recipe.checkpoint} are trained: {plan.trained / 1e6:,.2f} M of {plan.weights / 1e6:,.1f} M",
        f"{recipe.steps} steps of {recipe.parts * recipe.length:,} tokens, learning rate {recipe.learning_rate:.2g}; "
        f"about {plain_time(plan.needs[0].seconds_per_step * recipe.steps)}",
        f"memory: about {plan.needs[0].bytes / 1e9:.1f} GB of {free / 1e9:.1f} GB that are free",
    ]
    if wordless:
        lines.insert(1, f"{wordless} of them draw without words: their pictures have no captions")
    if replayed:
        lines.insert(2, f"{replayed} pictures that it draws by itself keep what it knows")
    return lines


def _check_folder(folder: Path, model: str, data: str, wishes: Wishes) -> None:
    """Notes in the folder what it is for. ValueError where it is for something else, or lies within the data."""
    place = Path(data).resolve() if Path(data).exists() else None
    require_outside(folder, data)
    asked: dict[str, Any] = {"model": model, "data": str(place or data)} | asdict(replace(wishes, steps=None))
    note = folder / "asked.json"
    if note.is_file():
        found = json.loads(note.read_text())
        if other := [name for name in asked if found.get(name) != asked[name]]:
            name = other[0]
            before, now = _told(name, found.get(name)), _told(name, asked[name])
            raise ValueError(f"{folder} holds a run {before}, not {now}; name another folder")
        if (states := saved_states(folder)) and wishes.steps and wishes.steps < step_of(states[-1]):
            raise ValueError(
                f"{folder} has done {step_of(states[-1])} steps, more than {wishes.steps}; name another one"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty, and holds no run to go on with; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    fresh = note.with_name(".asked.json")
    fresh.write_text(json.dumps(asked) + "\n")
    fresh.replace(note)


def _told(name: str, value: Any) -> str:
    """A wish, as it is given on the command line."""
    option = {"model": "MODEL", "with_adapters": "--lora"}.get(name, f"--{name.replace('_', '-')}")
    if value is None or value is False:
        return f"without {option}"
    return f"with {option}" if value is True else f"with {option} {value}"


def _replayed(wishes: Wishes, model: Emu3ForConditionalGeneration, lengths: NDArray[Any]) -> int:
    """How many pictures the checkpoint draws by itself: none where that would take longer than the training."""
    if not wishes.with_adapters or "draw" not in (getattr(model.config, "abilities", None) or ("draw",)):
        return 0
    if wishes.replay is not None:
        return wishes.replay
    return REPLAYED if model.model.text_model.config.hidden_size <= SMALL else 0


def _make_replay(
    pipeline: Emu3Pipeline, count: int, seed: int, folder: Path, data: list[Shard], show: Callable[[int, int], object]
) -> None:
    """Leaves the pictures as a shard, once."""
    if (folder / shard_name(0)).is_file():
        return
    can_read = "read" in (getattr(pipeline.model.config, "abilities", None) or ("read",))
    samples = make_replay(pipeline, count, seed, can_read, _captions(data), show)
    write_shard(folder / shard_name(0), replace(data[0].info, source="replay", settings="replay"), samples)


def _captions(shards: list[Shard]) -> list[str]:
    """What samples of a prompt and a drawing ask for, if it is short, as captions are."""
    outlines = chain.from_iterable(shard.outlines() for shard in shards)
    asked = (each.parts[0].content for each in outlines if [part.role for part in each.parts] == ["prompt", "draw"])
    return [content.text for content in asked if isinstance(content, Text) and len(content.text) <= LONGEST_CAPTION]
