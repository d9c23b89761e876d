"""Training a language model on sequences of text and pictures: next-token prediction with a weight for each token.

Muon (Jordan et al., 2024) trains the matrices of the layers, AdamW embeddings, head and norms. After a warm-up the rate
is constant, and over the last part it falls linearly to zero, so that a run can be extended from before the fall.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from emu3.configuration import Emu3TextConfig
from emu3.modeling.text import Emu3ForCausalLM
from emu3.tokenization import vocabulary_map
from emu3.training.loop import StepResult, autocast, run_loop, training_device
from emu3.training.recipe import RunSettings, arguments_of
from emu3.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe(RunSettings):
    """One run of a language model. Steps count batches.

    Attributes:
        model: arguments of `Emu3TextConfig`; ids and vocabulary size come from the tokenizer.
        code_factors: sizes of the factors whose product is the size of the codebook; see `share_factors`.
        learning_rate: of the layers' matrices (Muon).
        embedding_learning_rate: of all other parameters (AdamW).
        weight_decay: of the layers' matrices.
        warmup: steps of rising rate.
        decay_share: share of the steps with falling rate.
        compile: whether to compile the layers where the CPU trains; needs a C++ compiler. On a GPU, a small model takes
            longer to compile than it gains.
    """

    model: Annotated[dict[str, Any], arguments_of(Emu3TextConfig) | {"rope_theta": float}]
    code_factors: list[int] | None = None
    batch_size: int = 48
    learning_rate: float = 2e-3
    embedding_learning_rate: float = 4e-3
    weight_decay: float = 0.05
    warmup: int = 100
    decay_share: float = 0.4
    compile: bool = False


class SequenceBatch(NamedTuple):
    """Padded sequences: the log's name for the loss of their visual tokens, ids, and weights of the ids as targets."""

    task: str
    ids_BS: Tensor
    weights_BS: Tensor


def attend_causally(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Plain causal attention by two batched products: with bfloat16 tiles about twice as fast as SDPA's CPU kernel.

    Arguments and result are those of the functions of `emu3.modeling.attention.get_attention`.
    """
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1).reshape(-1, length, width) for x in (key, value))
    future = torch.full((length, length), -1e4, dtype=query.dtype).triu(1)
    scores = torch.baddbmm(
        future.expand(batch * heads, -1, -1), query.flatten(0, 1), key.transpose(1, 2), alpha=scaling
    )
    mixed = torch.bmm(scores.softmax(-1), value)
    return mixed.view(batch, heads, length, width).transpose(1, 2).contiguous(), None


@torch.no_grad()
def share_factors(model: Emu3ForCausalLM, vocabulary: Vocabulary, factors: Sequence[int]) -> None:
    """Starts each visual id, in embedding and head, as the sum of one vector for each factor of its code.

    Codes that share a factor then start alike, so what is learned of one holds for the others. The factor that varies
    slowest with the code comes first.
    """
    if math.prod(factors) != vocabulary.codebook_size:
        raise ValueError(f"code_factors {list(factors)} do not multiply to the {vocabulary.codebook_size} codes")
    for table in (model.model.embed_tokens.weight, model.lm_head.weight):
        visual = table[slice(*vocabulary.visual_span)]
        scale = float(visual.std()) / len(factors) ** 0.5
        total = torch.zeros(*factors, table.shape[1])
        for axis, size in enumerate(factors):
            faster = [1] * (len(factors) - axis - 1)
            total += scale * torch.randn(size, *faster, table.shape[1])
        visual.copy_(total.flatten(0, -2))


def make_optimizers(model: nn.Module, recipe: LanguageRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for all else."""
    matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if ".layers." not in name or p.ndim != 2]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=recipe.embedding_learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rates(recipe: LanguageRecipe, step: int) -> list[float]:
    """The rates of a step, of Muon and of AdamW: rising, flat, then falling to zero."""
    falling = (recipe.steps - step) / max(1.0, recipe.decay_share * recipe.steps)
    factor = min(1.0, (step + 1) / recipe.warmup, falling)
    return [recipe.learning_rate * factor, recipe.embedding_learning_rate * factor]


def next_token_loss(
    model: Emu3ForCausalLM, run_layers: Callable[..., Tensor], ids_BS: Tensor, weights_BS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of predicting each token from those before it; tokens of weight 0 do not count.

    `run_layers` runs the model's layers and may be compiled. Returns the mean by weight, the loss (targets,) and the id
    (targets,) of every target that counts.
    """
    with autocast():
        positions = torch.arange(ids_BS.shape[1] - 1, device=ids_BS.device)[None]
        hidden_BSE = run_layers(model.model.embed_tokens(ids_BS[:, :-1]), None, positions)
        counts_BS = weights_BS[:, 1:] > 0
        logits = model.lm_head(hidden_BSE[counts_BS])
    targets, weights = ids_BS[:, 1:][counts_BS], weights_BS[:, 1:][counts_BS]
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return (losses * weights).sum() / weights.sum(), losses.detach(), targets


def train(
    recipe: LanguageRecipe,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    make_batch: Callable[[int], SequenceBatch],
) -> None:
    """Runs the recipe to its end, from its last saved state if any; leaves `tokenizer` and `language` in `folder`.

    The tokenizer has ids for the visual codes too. `make_batch` is a pure function of the step; picklable. The log has
    the mean loss of visual tokens under the name of the batch's task, and that of text under "answer".
    """
    torch.manual_seed(recipe.seed)
    device = training_device()
    tokenizer.save_pretrained(folder / "tokenizer")
    vocabulary = Vocabulary.from_map(vocabulary_map(tokenizer))
    ids = {"pad_token_id": vocabulary.pad, "bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.eos}
    model = Emu3ForCausalLM(Emu3TextConfig(**recipe.model, vocab_size=len(tokenizer), **ids))
    if recipe.code_factors is not None:
        share_factors(model, vocabulary, recipe.code_factors)
    model.to(device)
    run_layers: Callable[..., Tensor] = model.model.run_layers
    if device.type == "cpu":
        run_layers = partial(run_layers, attend=attend_causally)
        if recipe.compile:
            run_layers = torch.compile(run_layers)

    def compute(batch: SequenceBatch, step: int) -> StepResult:
        loss, losses, targets = next_token_loss(model, run_layers, batch.ids_BS.to(device), batch.weights_BS.to(device))
        kinds = {batch.task: targets >= vocabulary.visual_base, "answer": targets < vocabulary.pad}
        metrics = {name: float(losses[chosen].mean()) for name, chosen in kinds.items() if chosen.any()}
        return StepResult(loss, metrics, batch.ids_BS.numel())

    rates = partial(learning_rates, recipe)
    run_loop(recipe, folder, model, make_optimizers(model, recipe), rates, make_batch, compute, unit="tokens")
    model.save_pretrained(folder / "language")
