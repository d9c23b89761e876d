"""nano's recipes: vision tokenizer, language model, the checkpoint assembled from both, and a draft head for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track

from emu3.checkpoints import resolve
from emu3.checkpoints.load import load_model, load_processor
from emu3.checkpoints.vision import load_vision_tokenizer
from emu3.configuration import Emu3VQVAEConfig
from emu3.data.samples import Sample
from emu3.data.shards import ShardInfo, shard_name, write_shard
from emu3.data.tokenize import tokenizer_hash
from emu3.icons.design import Design
from emu3.icons.edits import EDIT_KINDS, sample_edit
from emu3.icons.motion import CLIP_TASKS, FRAMES, MAX_SCENES, Clip, clip_caption, fits, render_clip, sample_clip
from emu3.icons.scenes import TASKS, Scene, render, sample_crowd, sample_scene
from emu3.icons.sequences import (
    ENCODED_AT_ONCE,
    IconDraftRecipe,
    IconPreferenceRecipe,
    IconShardsRecipe,
    IconTalesRecipe,
    SceneDrafts,
    ScenePrompts,
    SceneSource,
    check_sources,
    clip_sample,
    compare_sample,
    edit_sample,
    samples_of,
    story_sample,
    watch_sample,
)
from emu3.icons.stories import sample_story, sentence_of
from emu3.modeling.vision import Emu3VQVAE
from emu3.training import draft
from emu3.training.codes import encode, to_pixels
from emu3.training.held_out import HeldOut
from emu3.training.kinds import KINDS as TRAINING_KINDS
from emu3.training.machine import training_device
from emu3.training.preference import prefer
from emu3.training.recipe import Kind
from emu3.training.recipe import run_recipe as run_recipe_of
from emu3.training.sequences import SequenceBuilder
from emu3.training.state import require_output
from emu3.training.tokenizer import run_objective
from emu3.training.vision import PictureBatch, VisionObjective, VisionSettings, load_tokenizer

SAMPLES_OF_A_SHARD = 20_000
# Mostly the square, sometimes another ratio of the same area.
SIZES = ((48, 48),) * 6 + ((40, 56), (56, 40), (36, 64), (64, 36))
MEASURED_PICTURES = 256


@dataclass(frozen=True, kw_only=True)
class IconVisionRecipe(VisionSettings):
    """A vision tokenizer of the icon world; further fields are those of `VisionSettings`.

    Attributes:
        sizes: height and width, in pixels, of the pictures of a batch are one of these.
        shapes: of a designed codebook; None: the codebook is learned, or that of the tokenizer to start from.
        clip_share: share of the batches that are clips, as many as have `batch_size` frames.
        sheet_every: steps between two measurements with a sheet; None: measured at the end, without a sheet.
    """

    sizes: tuple[tuple[int, int], ...] = SIZES
    shapes: int | None = None
    batch_statistics: bool = True
    clip_share: float = 0.0
    sheet_every: int | None = None


def sample_batch(sizes: Sequence[tuple[int, int]], count: int, seed: int, step: int, part: int = 0) -> list[Scene]:
    """The scenes of one batch, all of one of the sizes, nothing held out; every second one is a crowd."""
    rng = np.random.default_rng([seed, step, part])
    height, width = sizes[int(rng.integers(len(sizes)))]
    tasks = [TASKS[index] for index in rng.integers(len(TASKS), size=count)]
    return [
        sample_crowd(rng, height, width) if index % 2 else sample_scene(task, rng, "train", height, width)
        for index, task in enumerate(tasks)
    ]


def make_picture_batch(
    sizes: Sequence[tuple[int, int]],
    design: Design | None,
    count: int,
    seed: int,
    clip_share: float,
    step: int,
    part: int = 0,
) -> PictureBatch:
    """The pictures of a batch, or the clips, and their codes by the design."""
    if np.random.default_rng([seed, step, part, 1]).random() < clip_share:
        clips = sample_clips(sizes, count, seed, step, part)
        frames_BTHWC = torch.from_numpy(np.stack([render_clip(clip) for clip in clips]))
        scenes_BT: list[Sequence[Scene]] = [clip.scenes for clip in clips]
        pixels = to_pixels(frames_BTHWC.flatten(0, 1)).unflatten(0, frames_BTHWC.shape[:2])
    else:
        scenes_BT = [(scene,) for scene in sample_batch(sizes, count, seed, step, part)]
        pixels = to_pixels(torch.from_numpy(np.stack([render(scene) for (scene,) in scenes_BT])))
    if design is None:
        return PictureBatch(pixels, None, step)
    codes_BTHW = np.stack([np.stack([design.codes_of(scene) for scene in scenes_T]) for scenes_T in scenes_BT])
    return PictureBatch(pixels, torch.from_numpy(codes_BTHW), step)


def sample_clips(sizes: Sequence[tuple[int, int]], frames: int, seed: int, step: int, part: int = 0) -> list[Clip]:
    """Clips of one size and length that have so many frames together, but at least one; nothing held out."""
    rng = np.random.default_rng([seed, step, part, 2])
    height, width = sizes[int(rng.integers(len(sizes)))]
    scenes = int(rng.integers(2, MAX_SCENES + 1))
    tasks = [task for task in CLIP_TASKS if fits(task, scenes, height, width)]
    chosen = rng.integers(len(tasks), size=max(1, frames // (FRAMES * scenes)))
    return [sample_clip(tasks[index], rng, "train", scenes, height, width) for index in chosen]


def train_vision(recipe: IconVisionRecipe, folder: Path) -> None:
    """Trains a vision tokenizer; see `emu3.training.tokenizer.run_objective`."""
    torch.manual_seed(recipe.seed)
    if recipe.start is not None:
        tokenizer, fresh = load_tokenizer(recipe)
    else:  # with PyTorch's own first weights, as in the shipped run
        tokenizer, fresh = Emu3VQVAE(Emu3VQVAEConfig(**recipe.model)), True
    objective = VisionObjective(tokenizer, recipe, fresh)
    design = None
    if recipe.shapes is not None:
        design = Design.of(recipe.shapes)
        objective.set_codebook(design.codebook)
    elif recipe.start is not None:
        design = Design.of_codebook(objective.codebook.detach().clone())
    make_batch = partial(make_picture_batch, recipe.sizes, design, recipe.batch_size, recipe.seed, recipe.clip_share)
    measured = partial(make_picture_batch, recipe.sizes[:1], None, MEASURED_PICTURES, recipe.seed + 2)
    pictures, clips = measured(0.0, 0).pixels, measured(1.0, 0).pixels if recipe.clip_share else None
    run_objective(recipe, folder, objective, make_batch, HeldOut(pictures, clips), recipe.sheet_every)


def export_shards(recipe: IconShardsRecipe, folder: Path) -> None:
    """Writes scenes as shards: FOLDER/NAME-draw and FOLDER/NAME-read for each source."""
    tokenizer = Emu3VQVAE.from_pretrained(require_output(recipe.vision)).to(training_device())
    for source, codes in zip(recipe.sources, encode_sources(recipe.sources, tokenizer, folder), strict=True):
        samples = samples_of(source, codes, recipe.turns, recipe.visits)
        for use, own in zip(("draw", "read"), samples, strict=True):
            info = ShardInfo(
                tokenizer=tokenizer_hash(tokenizer),
                codebook_size=tokenizer.config.codebook_size,
                settings="icons",
                source=f"{source.name_with_captions}-{use}",
            )
            for number, start in enumerate(range(0, len(own), SAMPLES_OF_A_SHARD)):
                path = folder / f"{source.name_with_captions}-{use}" / shard_name(number)
                write_shard(path, info, own[start : start + SAMPLES_OF_A_SHARD])


def export_tales(recipe: IconTalesRecipe, folder: Path) -> None:
    """Writes clips, edits and so on as shards, each kind in FOLDER/KIND. Their codes are designed."""
    tokenizer = load_vision_tokenizer(resolve(recipe.vision))
    design = Design.of_codebook(tokenizer.quantize.embedding.weight.detach())
    own, size = tokenizer_hash(tokenizer), tokenizer.config.codebook_size
    makers = {
        "clips": _make_clip,
        "edits": _make_edit,
        "stories": _make_story,
        "watched": _make_watched,
        "compared": _make_compared,
    }
    for number, (name, make) in enumerate(makers.items()):
        count = getattr(recipe, name)
        info = ShardInfo(tokenizer=own, codebook_size=size, settings="icons", source=name)
        for shard, start in enumerate(range(0, count, SAMPLES_OF_A_SHARD)):
            indices = range(start, min(start + SAMPLES_OF_A_SHARD, count))
            samples = [
                make(f"{index}", np.random.default_rng([recipe.seed, number, index]), design, recipe)
                for index in track(indices, description=name)
            ]
            write_shard(folder / name / shard_name(shard), info, samples)


def _make_clip(key: str, rng: np.random.Generator, design: Design, recipe: IconTalesRecipe) -> Sample:
    task = CLIP_TASKS[int(rng.integers(len(CLIP_TASKS)))]
    clip = sample_clip(task, rng, "train")
    words = clip_caption(clip, task, colored=bool(rng.random() < recipe.colored_captions))
    return clip_sample(key, np.stack([design.codes_of(each) for each in clip.scenes]), words, recipe.frames_per_second)


def _make_edit(key: str, rng: np.random.Generator, design: Design, recipe: IconTalesRecipe) -> Sample:
    edit = sample_edit(EDIT_KINDS[int(rng.integers(len(EDIT_KINDS)))], rng, "train")
    return edit_sample(key, design.codes_of(edit.before), design.codes_of(edit.after), edit.words)


def _make_watched(key: str, rng: np.random.Generator, design: Design, recipe: IconTalesRecipe) -> Sample:
    task = CLIP_TASKS[int(rng.integers(len(CLIP_TASKS)))]
    clip = sample_clip(task, rng, "train")
    codes_THW = np.stack([design.codes_of(each) for each in clip.scenes])
    return watch_sample(key, codes_THW, clip_caption(clip, task), recipe.frames_per_second)


def _make_compared(key: str, rng: np.random.Generator, design: Design, recipe: IconTalesRecipe) -> Sample:
    edit = sample_edit(EDIT_KINDS[int(rng.integers(len(EDIT_KINDS)))], rng, "train")
    return compare_sample(key, design.codes_of(edit.before), design.codes_of(edit.after), sentence_of(edit))


def _make_story(key: str, rng: np.random.Generator, design: Design, recipe: IconTalesRecipe) -> Sample:
    story = sample_story(rng, "train")
    return story_sample(key, story, [design.codes_of(scene) for scene in story.scenes])


def train_draft(recipe: IconDraftRecipe, folder: Path) -> None:
    """Trains a draft head for a checkpoint that draws icons; see `emu3.training.draft.train`.

    `ValueError` where a step has no source of scenes, or where the checkpoint cannot be loaded.
    """
    check_sources(recipe.sources, recipe.steps)
    model = load_model(recipe.checkpoint, dtype=torch.float32).to(training_device())
    codes = encode_sources(recipe.sources, model.model.vqmodel, folder)
    builder = SequenceBuilder(load_processor(recipe.checkpoint), model.model.vocabulary)
    draft.train(recipe, folder, model, SceneDrafts(recipe, builder, codes).batch)


def train_preference(recipe: IconPreferenceRecipe, folder: Path) -> None:
    """Trains a checkpoint by rewards of its icons; see `emu3.training.preference.prefer`.

    `ValueError` where a step has no source of scenes, or where the checkpoint cannot be loaded.
    """
    check_sources(recipe.sources, recipe.steps)
    prefer(recipe, folder, ScenePrompts(recipe.sources, recipe.seed, recipe.batch_size))


def encode_sources(sources: Sequence[SceneSource], tokenizer: Emu3VQVAE, folder: Path) -> list[NDArray[Any]]:
    """The codes (scenes, H, W) of each source, kept in the output folder."""
    return [
        encode(tokenizer, source.pictures, range(0, source.count, ENCODED_AT_ONCE), source.name, folder / "codes")
        for source in sources
    ]


KINDS = {
    **TRAINING_KINDS,
    "icon_vision": Kind(IconVisionRecipe, train_vision),
    "icon_shards": Kind(IconShardsRecipe, export_shards),
    "icon_tales": Kind(IconTalesRecipe, export_tales),
    "icon_preference": Kind(IconPreferenceRecipe, train_preference),
    "icon_draft": Kind(IconDraftRecipe, train_draft),
}
"""The kinds of recipe that `emu3 train` knows."""


def run_recipe(path: str | Path) -> Path:
    """Runs one of these recipes; see `emu3.training.recipe.run_recipe`."""
    return run_recipe_of(path, KINDS)
