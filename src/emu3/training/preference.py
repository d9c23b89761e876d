"""Training a checkpoint by preferences: pairs of pictures (DPO), or rewards of pictures that it draws itself (GRPO)."""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from emu3.checkpoints import resolve
from emu3.checkpoints.load import load_model, load_processor
from emu3.data.shards import open_shards
from emu3.data.tokenize import tokenizer_hash
from emu3.modeling.draft import load_draft
from emu3.pipeline import Emu3Pipeline
from emu3.training.adapters import MATRICES, add_adapters
from emu3.training.dpo import DPO, DPOSettings, PairBatches
from emu3.training.grpo import GRPO, GRPOSettings, PromptBatch, load_function
from emu3.training.loop import rate_factor, run_loop
from emu3.training.machine import training_device
from emu3.training.recipe import RunSettings
from emu3.training.results import configured_dtype, save_adapter, save_checkpoint, stored_dtype
from emu3.training.scoring import Reference


@dataclass(frozen=True, kw_only=True)
class PreferenceRecipe(RunSettings):
    """One run of either method. A part of a step has `batch_size` pairs, or groups of pictures.

    All weights of the layers are trained, and the last norm; embeddings and the output layer, which every task shares,
    stay as they are. With a rank, adapters are trained instead.

    Attributes:
        checkpoint: a name, as for `emu3 image --model`.
        method: "dpo" or "grpo".
        data: of DPO, folders of shards of pairs; see `emu3.training.dpo.pair_of`.
        dpo, grpo: what the methods take.
        reward: of GRPO, "module:function" of a prompt and a picture, that gives a number; 1 for a right picture.
        group_reward: "module:function" of a prompt and its pictures, that gives a number for each.
        prompts: of GRPO, a text file with a prompt a line.
        batch_size: pairs or prompts of a part.
        rank, alpha, modules: of adapters, as in `LoraRecipe`; rank 0: no adapters.
        learning_rate: of AdamW, at its highest.
        weight_decay: of AdamW.
        warmup: steps of rising rate.
        decay_share: share of the steps with falling rate.
    """

    checkpoint: str
    method: Literal["dpo", "grpo"]
    data: tuple[Path, ...] = ()
    dpo: DPOSettings = field(default_factory=DPOSettings)
    grpo: GRPOSettings = field(default_factory=GRPOSettings)
    reward: str | None = None
    group_reward: str | None = None
    prompts: Path | None = None
    batch_size: int = 4
    rank: int = 0
    alpha: float = 32.0
    modules: tuple[str, ...] = MATRICES
    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    warmup: int = 10
    decay_share: float = 0.4


PromptSource = Callable[[int, int], list[str]]
"""(rollout, part) -> prompts; a pure function, picklable."""


@dataclass(frozen=True)
class PromptBatches:
    """Makes GRPO's batches: the same prompts and seeds for all updates of a rollout.

    Attributes:
        source: of the prompts.
        seed: of the pictures.
        reuse: see `GRPOSettings`.
    """

    source: PromptSource
    seed: int
    reuse: int

    def __call__(self, step: int, part: int) -> PromptBatch:
        """The batch of a step's part."""
        rollout = step // self.reuse
        seed = int(np.random.default_rng([self.seed, rollout, part]).integers(2**40))
        return PromptBatch(rollout, part, self.source(rollout, part), seed)


@dataclass(frozen=True)
class PromptLines:
    """Some of the lines of a file, as often as they are needed."""

    lines: tuple[str, ...]
    seed: int
    count: int

    def __call__(self, rollout: int, part: int) -> list[str]:
        """The prompts of a part."""
        rng = np.random.default_rng([self.seed, rollout, part])
        return [self.lines[n] for n in rng.permutation(len(self.lines))[: self.count]]


def prefer(recipe: PreferenceRecipe, folder: Path, source: PromptSource | None = None) -> None:
    """Trains by the recipe, from the last saved state if any; leaves a checkpoint, or an adapter, in the folder.

    `source` gives GRPO's prompts in place of the recipe's file. ValueError where something is missing.
    """
    objective_of = _dpo if recipe.method == "dpo" else partial(_grpo, source=source)
    checked = objective_of(recipe)  # before anything is loaded
    if recipe.recompute_layers:
        raise ValueError("recompute_layers has no effect here; leave it out, and lower batch_size")
    origin = resolve(recipe.checkpoint)
    model = load_model(origin, dtype=torch.float32).requires_grad_(False)
    pipeline = Emu3Pipeline(model, load_processor(origin), draft=load_draft(origin, model))
    torch.manual_seed(recipe.seed)
    adapted: Any = None
    if recipe.rank:
        adapted = add_adapters(model, recipe.rank, recipe.alpha, recipe.modules)
        reference = Reference(model, None)
    else:
        reference = Reference(model, copy.deepcopy(model).to(training_device()))
        for trained in (model.model.text_model.layers, model.model.text_model.norm):
            trained.requires_grad_(True)
    objective, make_batch = checked(pipeline, reference)
    model.to(training_device())
    if pipeline.draft is not None:
        pipeline.draft.to(training_device())
    optimizers, rates = partial(make_optimizers, recipe), partial(learning_rates, recipe)
    run_loop(recipe, folder, objective, optimizers, rates, make_batch, unit="tokens")
    if adapted is not None:
        save_adapter(adapted, recipe.checkpoint, folder)
    else:
        computed = configured_dtype(origin)
        save_checkpoint(model, pipeline.processor, folder, stored_dtype(origin), beside=origin, computed=computed)


def make_optimizers(recipe: PreferenceRecipe, objective: nn.Module) -> list[torch.optim.Optimizer]:
    """One, of all weights that are trained."""
    trained = [each for each in objective.parameters() if each.requires_grad]
    return [torch.optim.AdamW(trained, recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay)]


def learning_rates(recipe: PreferenceRecipe, step: int) -> list[float]:
    """The rate of a step: rising, flat, then falling to zero."""
    return [recipe.learning_rate * rate_factor(step, recipe.steps, recipe.warmup, recipe.decay_share)]


Made = Callable[[Emu3Pipeline, Reference], tuple[nn.Module, Callable[[int, int], Any]]]


def _dpo(recipe: PreferenceRecipe) -> Made:
    if not recipe.data:
        raise ValueError(
            "data is missing; name folders with shards of pairs, as `write_pairs` of emu3.training.dpo makes"
        )
    for folder in recipe.data:
        open_shards(folder)

    def make(pipeline: Emu3Pipeline, reference: Reference) -> tuple[nn.Module, Callable[[int, int], Any]]:
        own = tokenizer_hash(pipeline.model.model.vqmodel)
        paths = tuple(Path(shard.path) for folder in recipe.data for shard in open_shards(folder, own))
        batches = PairBatches(paths, pipeline.layout, recipe.dpo, recipe.seed, recipe.batch_size)
        return DPO(pipeline.model, recipe.dpo, reference), batches

    return make


def _grpo(recipe: PreferenceRecipe, source: PromptSource | None) -> Made:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("grpo draws with one process, as drawing needs all weights; run it without accelerate launch")
    if recipe.reward is None:
        raise ValueError("reward is missing; name a function of a prompt and a picture as module:function")
    reward = load_function(recipe.reward)
    group_reward = None if recipe.group_reward is None else load_function(recipe.group_reward)
    if source is None:
        if recipe.prompts is None or not recipe.prompts.is_file():
            raise ValueError(f"prompts = {recipe.prompts}: no such file; name a text file with a prompt a line")
        lines = tuple(filter(None, map(str.strip, recipe.prompts.read_text().splitlines())))
        if not lines:
            raise ValueError(f"{recipe.prompts} has no prompts; write one a line")
        source = PromptLines(lines, recipe.seed, recipe.batch_size)
    batches = PromptBatches(source, recipe.seed, recipe.grpo.reuse)

    def make(pipeline: Emu3Pipeline, reference: Reference) -> tuple[nn.Module, Callable[[int, int], Any]]:
        start = reference if recipe.grpo.kl else None
        return GRPO(pipeline, recipe.grpo, reward, start, group_reward), batches

    return make
