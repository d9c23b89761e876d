"""Training a draft head: to say what a checkpoint's own distribution of each token will be, some tokens ahead.

The checkpoint stays as it is. It reads pictures with their words and, for guidance, without. The head sees the hidden
state of the first, and its target is the guided distribution. So it drafts under guidance at the price of one lane.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emu3.generation.sampling import Guide
from emu3.modeling.draft import DraftHead, around
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.options import GUIDANCE
from emu3.quantization import dequantize_head
from emu3.training.loop import StepResult, rate_factor, run_loop
from emu3.training.machine import autocast, training_device
from emu3.training.objective import attend_on_cpu
from emu3.training.recipe import RunSettings


@dataclass(frozen=True, kw_only=True)
class DraftRecipe(RunSettings):
    """One run of a draft head. Steps count batches.

    Attributes:
        checkpoint: the folder whose model it drafts for, and which gets the head.
        width, ahead: of the `DraftHead`.
        guidance_scale, guidance_floor, guidance_agreement: with which pictures will be drawn.
        reuse: steps for which a batch of pictures is used, as to run the checkpoint on them takes longer than a step.
        rows: how many pairs of a picture's positions a step looks at: the newest decided one, and one ahead of it.
        learning_rate: of the matrices (Muon), at its highest.
        other_learning_rate: of all other parameters (AdamW).
        warmup: steps of rising rate.
        decay_share: share of the steps with falling rate.
    """

    checkpoint: Path
    width: int = 256
    ahead: int = 16
    guidance_scale: float = 3.0
    guidance_floor: float = 0.0
    guidance_agreement: float = 0.0
    batch_size: int = 8
    reuse: int = 3
    rows: int = 250
    learning_rate: float = 5e-3
    other_learning_rate: float = 5e-3
    warmup: int = 20
    decay_share: float = 0.6


class DraftBatch(NamedTuple):
    """Pictures of one size, as sequences: first all with their words, then all without.

    Attributes:
        ids_BS: padded on the right.
        height, width: of each picture, in codes.
        number: of the batch.
    """

    ids_BS: Tensor
    height: int
    width: int
    number: int


class Pairs(NamedTuple):
    """What the head is asked: which position is the newest decided one, and which it shall tell, both (B, R)."""

    newest: Tensor
    ahead: Tensor

    @classmethod
    def sample(cls, batch: DraftBatch, pictures: int, rows: int, ahead: int) -> "Pairs":
        """So many random pairs of each picture, of positions at most `ahead` apart."""
        place = torch.arange(batch.height * (batch.width + 1) - 1)
        newest, distance = torch.cartesian_prod(place, torch.arange(1, ahead + 1)).unbind(1)
        is_code = place % (batch.width + 1) < batch.width
        fits = newest + distance < len(place)
        fits &= is_code[newest] & is_code[(newest + distance).clamp_max(len(place) - 1)]
        newest, distance = newest[fits], distance[fits]
        chosen = torch.randint(max(1, len(newest)), (pictures, rows))
        return cls(newest[chosen], (newest + distance)[chosen])


class Reading(NamedTuple):
    """What the checkpoint makes of a batch: the state that decides each position of a picture, and the codes.

    Attributes:
        with_words, without: (B, S, E), for S positions of the pictures.
        codes: (B, S); what is no code has the number behind the last.
    """

    with_words: Tensor
    without: Tensor
    codes: Tensor


@torch.no_grad()
def read(model: Emu3ForConditionalGeneration, batch: DraftBatch) -> Reading:
    """Runs the checkpoint on a batch."""
    text_model, vocabulary = model.model.text_model, model.model.vocabulary
    lo, hi = vocabulary.visual_span
    ids_BS = batch.ids_BS.to(text_model.embed_tokens.weight.device)
    on_cpu = ids_BS.device.type == "cpu"
    run_layers = partial(text_model.run_layers, attend=attend_on_cpu) if on_cpu else text_model.run_layers
    with autocast():
        places_1S = torch.arange(ids_BS.shape[1], device=ids_BS.device)[None]
        hidden_BSE = run_layers(text_model.embed_tokens(ids_BS), None, places_1S)
    # The token in front of a picture decides its position 0.
    inputs_BS = (ids_BS == vocabulary.img).int().argmax(1)[:, None] + torch.arange(
        batch.height * (batch.width + 1) - 1, device=ids_BS.device
    )
    with_words, without = hidden_BSE.gather(1, inputs_BS[..., None].expand(-1, -1, hidden_BSE.shape[2])).chunk(2)
    codes_BS = ids_BS.gather(1, inputs_BS + 1).chunk(2)[0] - lo
    return Reading(with_words, without, codes_BS.where((codes_BS >= 0) & (codes_BS < hi - lo), hi - lo))


def draft_loss(
    model: Emu3ForConditionalGeneration,
    head: DraftHead,
    reading: Reading,
    width: int,
    pairs: Pairs,
    guide: Guide,
) -> tuple[Tensor, Tensor]:
    """The mean divergence of the drafts from what the model says, and how much of the two distributions is common.

    Args:
        model: the checkpoint's.
        head: in training.
        reading: of the checkpoint.
        width: of the pictures, in codes.
        pairs: of positions.
        guide: with which pictures will be drawn.
    """
    lo, hi = model.model.vocabulary.visual_span
    visual_VE, device = dequantize_head(model.lm_head, slice(lo, hi)), reading.codes.device
    newest_R, ahead_R = (each.flatten().to(device) for each in pairs)
    own_R = torch.arange(len(pairs.ahead), device=device).repeat_interleave(pairs.ahead.shape[1])
    with torch.no_grad():
        with autocast():
            lanes = [hidden_BSE[own_R, ahead_R] @ visual_VE.T for hidden_BSE in (reading.with_words, reading.without)]
        conditional_RV, unconditional_RV = (each.float() for each in lanes)
        wanted_RV, left_out_RV = guide.logits(conditional_RV, unconditional_RV)
        if left_out_RV is not None:
            wanted_RV = wanted_RV.masked_fill(left_out_RV, -torch.inf)
        wanted_RV = wanted_RV.softmax(-1)
        places_RN = around(width, ahead_R, newest_R)
        codes_RN = reading.codes[own_R[:, None], places_RN.clamp_min(0)].where(places_RN >= 0, hi - lo)
    table = head.table(model.model.text_model.embed_tokens.weight[lo:hi])
    prepared_RM = head.prepare(reading.with_words[own_R, newest_R], ahead_R - newest_R)
    drafts_RV = (head(prepared_RM, codes_RN, table) @ visual_VE.T.to(prepared_RM.dtype)).log_softmax(-1)
    loss = F.kl_div(drafts_RV, wanted_RV, reduction="batchmean")
    return loss, torch.minimum(drafts_RV.detach().exp(), wanted_RV).sum(-1).mean()


def make_optimizers(head: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for all else."""
    matrices = [module.weight for module in head.modules() if isinstance(module, nn.Linear)]
    of_muon = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in head.parameters() if id(parameter) not in of_muon]
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rates(recipe: DraftRecipe, step: int) -> list[float]:
    """The rates of a step, of Muon and of AdamW: rising, flat, then falling to zero."""
    factor = rate_factor(step, recipe.steps, recipe.warmup, recipe.decay_share)
    return [recipe.learning_rate * factor, recipe.other_learning_rate * factor]


def train(
    recipe: DraftRecipe, folder: Path, model: Emu3ForConditionalGeneration, make_batch: Callable[[int], DraftBatch]
) -> None:
    """Runs the recipe to its end, from its last saved state if any; leaves the head in the checkpoint's folder.

    `make_batch` is a pure function of the batch's number; picklable. The log has the loss and the share of the model's
    distribution that drafts cover, which is how often a draft would pass speculative verification.
    """
    torch.manual_seed(recipe.seed)
    model = model.to(training_device()).requires_grad_(False)
    head = DraftHead(model.lm_head.in_features, recipe.width, recipe.ahead)
    with torch.no_grad():
        head.norm.weight.copy_(model.model.text_model.norm.weight)  # the scale that the output head is used to
    head.to(training_device())
    make = partial(_make_shared, make_batch, recipe.reuse)
    rates = partial(learning_rates, recipe)
    run_loop(recipe, folder, DraftLoss(recipe, model, head), make_optimizers, rates, make, unit="tokens")
    head.save(recipe.checkpoint)


class DraftLoss(nn.Module):
    """The objective of a draft head. The checkpoint reads each batch once."""

    def __init__(self, recipe: DraftRecipe, model: Emu3ForConditionalGeneration, head: DraftHead) -> None:
        super().__init__()
        self.recipe, self.head = recipe, head
        self._model = [model]  # in a list, so that it is no part of what is trained and saved
        self._last: dict[int, Reading] = {}

    def forward(self, batch: DraftBatch) -> StepResult:
        """The mean divergence of a random choice of positions."""
        model = self._model[0]
        if batch.number not in self._last:
            self._last = {batch.number: read(model, batch)}
        reading = self._last[batch.number]
        pairs = Pairs.sample(batch, len(reading.codes), self.recipe.rows, self.recipe.ahead)
        guide = Guide(*(getattr(self.recipe, name) for name in GUIDANCE))
        loss, covered = draft_loss(model, self.head, reading, batch.width, pairs, guide)
        one = torch.ones((), device=loss.device)
        return StepResult(loss, one, {"covered": (covered, one)}, pairs.ahead.numel())


def _make_shared(make_batch: Callable[[int], DraftBatch], reuse: int, step: int, part: int) -> DraftBatch:
    return make_batch(step // reuse)
