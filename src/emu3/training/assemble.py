"""Writes a trained language model as the checkpoint that people get."""

from dataclasses import dataclass
from pathlib import Path

import torch

from emu3.checkpoints.load import load_model, load_processor
from emu3.checkpoints.opened import WORDS
from emu3.training.recipe import Checked
from emu3.training.results import save_checkpoint
from emu3.training.state import require_output


@dataclass(frozen=True, kw_only=True)
class AssembleRecipe(Checked):
    """What goes into a checkpoint.

    Attributes:
        language: folder that the language model's recipe left.
        words: a text file of words that the checkpoint knows, which a page offers to complete; others get a note.
    """

    language: Path
    words: Path | None = None


def assemble(recipe: AssembleRecipe, folder: Path) -> None:
    """Writes the checkpoint in the documented layout: weights stored in float16, to be loaded as float32."""
    source = require_output(recipe.language)
    model, processor = load_model(source, dtype=torch.float32), load_processor(source)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model, processor, folder, torch.float16)
    if recipe.words is not None:
        (folder / WORDS).write_text(recipe.words.read_text())
