"""The kind of recipe "vision": from people's pictures and clips to a vision tokenizer, with figures and sheets."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import nn

from emu3.data.sources import open_source
from emu3.training.crops import Crops, CropSettings, find_media, split
from emu3.training.held_out import HeldOut
from emu3.training.loop import Hook, run_loop
from emu3.training.results import is_first_process
from emu3.training.state import require_outside, write_log
from emu3.training.vision import PictureBatch, VisionObjective, VisionSettings, learning_rate, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class VisionRecipe(VisionSettings):
    """One run of a vision tokenizer on people's pictures; further fields are those of `VisionSettings`.

    Attributes:
        source: a folder of pictures and clips, or whatever else `emu3 data` reads; named as on the command line.
        source_kind: what it is, where its name does not say.
        crop: height and width of the pictures of a batch, in pixels.
        zoom: a crop shows between 1 / zoom and all of a picture's shorter side.
        flip: whether every second crop is mirrored. Turn it off where writing matters.
        recolor: share of the crops whose red, green and blue change places, so that few pictures teach all colours.
        clip_share: share of the batches that are clips, if there are clips.
        frames: of a clip; a batch of clips has `batch_size` frames in all.
        stride: from one frame to the next.
        held_out: share of the source that is measured, and not trained on.
        held_out_crops: how many crops of it are measured.
        sheet_every: steps between two measurements with a sheet; the last step has one.
        cache_megabytes: of decoded pictures that each process keeps.
    """

    source: str
    source_kind: Literal["folder", "webdataset", "parquet", "datasets", "conversations"] | None = None
    crop: int = 128
    zoom: float = 4.0
    flip: bool = True
    recolor: float = 0.0
    clip_share: float = 0.5
    frames: int = 8
    stride: int = 1
    held_out: float = 0.05
    held_out_crops: int = 64
    sheet_every: int = 1000
    cache_megabytes: int = 1024
    batch_size: int = 16

    def crops(self) -> CropSettings:
        """How crops are cut."""
        return CropSettings(
            size=self.crop,
            zoom=self.zoom,
            flip=self.flip,
            recolor=self.recolor,
            frames=self.frames,
            stride=self.stride,
            cache_megabytes=self.cache_megabytes,
        )


MakeBatch = Callable[[int, int], PictureBatch]
"""(step, part) -> a batch; a pure function, picklable. The parts of a step are its batches."""


def train_vision(recipe: VisionRecipe, folder: Path) -> None:
    """Runs the recipe to its end, from its last saved state if any; leaves the tokenizer in `folder/vision`."""
    require_outside(folder, recipe.source)
    torch.manual_seed(recipe.seed)
    tokenizer, fresh = load_tokenizer(recipe)
    check_sizes(recipe, tokenizer.spatial_scale_factor, tokenizer.config.temporal_downsample_factor)
    source = open_source(recipe.source, kind=recipe.source_kind)
    training, held_out = split(find_media(source), recipe.held_out)
    crops = Crops(source, training, recipe.crops(), recipe.seed)
    kept = Crops(source, held_out, replace(recipe.crops(), recolor=0.0), recipe.seed + 1)
    has_clips = kept.has("clip") and recipe.clip_share > 0
    measured = HeldOut(
        kept.pictures(recipe.held_out_crops, 0) if kept.has("picture") or kept.has("clip") else None,
        kept.clips(max(1, recipe.held_out_crops // recipe.frames), 1) if has_clips else None,
    )
    make_batch = partial(crops.batch, recipe.clip_share, recipe.batch_size)
    run_objective(recipe, folder, VisionObjective(tokenizer, recipe, fresh), make_batch, measured, recipe.sheet_every)


def check_sizes(recipe: VisionRecipe, space: int, time: int) -> None:
    """ValueError where crops or clips do not fit the tokenizer, or cannot be measured."""
    if recipe.crop % space or recipe.crop < max(16, space):
        raise ValueError(f"crop is {recipe.crop}; give a multiple of {space}, the pixels of a code, and at least 16")
    if recipe.clip_share and recipe.frames % time:
        raise ValueError(f"frames is {recipe.frames}; give a multiple of {time}, the frames that share a code")
    if recipe.discriminator and recipe.crop < 32:
        raise ValueError(f"crop is {recipe.crop}; the discriminator needs at least 32")
    for name, lowest in (("zoom", 1), ("stride", 1), ("frames", 1), ("held_out_crops", 1), ("sheet_every", 1)):
        if getattr(recipe, name) < lowest:
            raise ValueError(f"{name} is {getattr(recipe, name)}; give at least {lowest}")
    for name in ("clip_share", "held_out", "recolor"):
        if not 0 <= getattr(recipe, name) <= 1:
            raise ValueError(f"{name} is {getattr(recipe, name)}; give a share from 0 to 1")


def run_objective(
    settings: VisionSettings,
    folder: Path,
    objective: VisionObjective,
    make_batch: MakeBatch,
    held_out: HeldOut,
    sheet_every: int | None = None,
) -> None:
    """Trains any objective on any batches, and measures it; leaves the tokenizer in `folder/vision`.

    ValueError where several processes were started: they would share out the codebook, which moves as a whole.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a vision tokenizer is trained by one process; start one, and set parts for larger batches")

    def report(step: int) -> None:
        figures = {f"held_out_{name}": value for name, value in held_out.measure(objective).items()}
        if not is_first_process():
            return
        if figures:
            print(write_log(folder, step=step, **figures), flush=True)
        if sheet_every and figures:
            held_out.write_sheet(objective, folder, step)

    rates, hook = partial(_rates, settings), Hook(sheet_every or settings.steps, report)
    run_loop(settings, folder, objective, _make_optimizers, rates, make_batch, "pictures", [hook])
    if is_first_process():
        objective.tokenizer.save_pretrained(folder / "vision")
        if held_out.clips is not None:
            for name, figures in held_out.compare_clips(objective).items():
                name = name.replace(" ", "_")
                print(
                    write_log(folder, step=settings.steps, **{f"{name}_{key}": each for key, each in figures.items()})
                )


def _make_optimizers(objective: nn.Module) -> list[torch.optim.Optimizer]:
    groups = cast(VisionObjective, objective).parameter_groups()
    return [torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)]


def _rates(settings: VisionSettings, step: int) -> list[float]:
    return [learning_rate(settings, step)]
