"""Pictures that a model draws while it is trained: the same prompts and seeds each time, as a contact sheet."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.pipeline import Emu3Pipeline
from emu3.processing import Emu3Processor
from emu3.sheet import contact_sheet


class Drawings:
    """Draws for a run. Weights that several processes share out are not gathered, so there it draws nothing."""

    def __init__(
        self, model: Emu3ForConditionalGeneration, processor: Emu3Processor, prompts: Sequence[str], folder: Path
    ) -> None:
        self.model, self.processor, self.prompts, self.folder = model, processor, list(prompts), folder

    def draw(self, step: int) -> None:
        """Writes FOLDER/step-000500.png."""
        if dist.is_initialized() or not self.prompts:
            return
        # Drawing must not change the random numbers of training.
        with torch.random.fork_rng():
            pipeline = Emu3Pipeline(merged_copy(self.model), self.processor)
            prompts = [each for each in self.prompts if _fits(pipeline, each)]
            pictures = pipeline.image(prompts, seed=0) if prompts else []
        if not pictures:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        contact_sheet(pictures, prompts, columns=4).save(self.folder / f"step-{step:06d}.png")


def _fits(pipeline: Emu3Pipeline, prompt: str) -> bool:
    """Whether the context holds the prompt and its picture; a caption of the data may be of any length."""
    try:
        pipeline.draw_requests(prompt)
    except ValueError:
        return False
    return True


@torch.no_grad()
def merged_copy(model: Emu3ForConditionalGeneration) -> Emu3ForConditionalGeneration:
    """The model in evaluation mode, with the adapters of its layers, if any, merged into a copy."""
    if not any(hasattr(module, "lora_A") for module in model.modules()):
        return model.eval()
    copied: Any = copy.deepcopy(model)
    for name, module in list(copied.named_modules()):
        if hasattr(module, "lora_A"):
            module.merge()
            parent, _, own = name.rpartition(".")
            setattr(copied.get_submodule(parent), own, module.get_base_layer())
    return copied.eval()
