"""Training the language model on scenes drawn and read: next-token prediction with a weight for each kind of token.

Muon (Jordan et al., 2024) for the matrices of the layers, AdamW for embeddings, head and norms; the rate is constant
after a warm-up and falls linearly to zero over the last part, so that a run can be extended from before the fall.

Shapes: B batch, S sequence, N targets, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from emu3.configuration import Emu3TextConfig
from emu3.icons.captions import DESCRIBE, caption, full_caption, questions
from emu3.icons.scenes import TASKS, Scene, Task, sample_scene
from emu3.modeling.text import Emu3ForCausalLM
from emu3.modeling.vision import Emu3VQVAE
from emu3.tokenization import train_tokenizer, vocabulary_map
from emu3.training.ahead import made_ahead
from emu3.training.codes import SceneSource, encoded
from emu3.training.precision import autocast, training_device
from emu3.training.recipe import made_before
from emu3.training.sequences import SYSTEM, SequenceBuilder, Weights, collate
from emu3.training.state import Log, load_state, save_state
from emu3.vocabulary import Vocabulary


@dataclass(frozen=True)
class LanguageRecipe:
    """One run. Steps count batches.

    Attributes:
        model: arguments of `Emu3TextConfig`; ids and vocabulary size come from the tokenizer.
        vision: folder with the trained vision tokenizer, relative to the output folder.
        texts: files, relative to the output folder, that the text tokenizer is trained on beside captions.
        text_entries: size of the text tokenizer.
        sources: arguments of `SceneSource` and of `Use`. All pictures of a batch are of one source.
        code_factors: sizes of the factors whose product the codebook is; see `share_factors`.
        steps, batch_size, seed: length of the run.
        draw_share: share of batches that draw; the others read.
        turns: most questions about one picture.
        learning_rate, embedding_learning_rate: of the layers' matrices (Muon), and of all else (AdamW).
        warmup, decay_share: steps of rising rate; share of the steps with falling rate.
        weights: arguments of `Weights`.
        compile: whether to compile the layers where the CPU trains; needs a C++ compiler. A GPU waits longer for the
            compiler than it gains at the sizes that are trained here.
    """

    model: dict[str, Any]
    vision: str
    texts: list[str] = field(default_factory=list)
    text_entries: int = 1024
    sources: list[dict[str, Any]] = field(default_factory=list)
    code_factors: Sequence[int] | None = None
    seed: int = 0
    steps: int = 6000
    batch_size: int = 48
    draw_share: float = 0.6
    turns: int = 4
    learning_rate: float = 2e-3
    embedding_learning_rate: float = 4e-3
    weight_decay: float = 0.05
    warmup: int = 100
    decay_share: float = 0.4
    weights: dict[str, float] = field(default_factory=dict)
    compile: bool = False
    report_every: int = 50
    save_every: int = 500


@dataclass(frozen=True)
class Use:
    """How training uses a source.

    Attributes:
        share: of the batches, relative to the other sources in use.
        steps: first step and the one after the last in which it is used; None: in all.
        full_captions, colored_captions: shares of its drawings asked for by the full caption, and by the task's caption
            with all colours named. Words that leave colours open teach that a held-out colour never occurs.
    """

    share: float
    steps: Sequence[int] | None = None
    full_captions: float = 0.0
    colored_captions: float = 0.0

    def covers(self, step: int) -> bool:
        return self.steps is None or self.steps[0] <= step < self.steps[1]

    def words(self, scene: Scene, task: Task, rng: np.random.Generator) -> str:
        """What a drawing of the scene is asked for by."""
        kind = rng.random()
        if kind < self.full_captions:
            return full_caption(scene)
        return caption(scene, task, colored=kind < self.full_captions + self.colored_captions)


# A source, its codes, and its use.
Stock = tuple[SceneSource, NDArray[np.int16], Use]


def split_source(entry: Mapping[str, Any]) -> tuple[SceneSource, Use]:
    """A `[[sources]]` table of a recipe as its two parts. ValueError for a name that neither has, or one left out."""
    use = {each.name: entry[each.name] for each in fields(Use) if each.name in entry}
    rest = {name: value for name, value in entry.items() if name not in use}
    try:
        return SceneSource(**{**rest, "tasks": tuple(rest.get("tasks", TASKS))}), Use(**use)
    except TypeError as error:
        raise ValueError(f"[[sources]] {dict(entry)}: {error}") from error


def corpus() -> Iterator[str]:
    """Captions, questions and answers of scenes, for the text tokenizer."""
    rng = np.random.default_rng(0)
    for index in range(6000):
        task = TASKS[index % len(TASKS)]
        scene = sample_scene(task, rng, "train")
        yield caption(scene, task)
        yield full_caption(scene)
        yield f"{SYSTEM}{DESCRIBE}. ASSISTANT: {full_caption(scene)}"
        for question in questions(scene):
            yield f" USER: {question.text}. ASSISTANT: {question.answer}"


def text_tokenizer(recipe: LanguageRecipe, folder: Path, codebook_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer trained on the corpus and the recipe's files, with ids for so many visual codes."""
    texts = [(folder / path).resolve().read_text() for path in recipe.texts]
    return train_tokenizer([*corpus(), *texts], recipe.text_entries, codebook_size)


def batch(
    recipe: LanguageRecipe, stock: list[Stock], builder: SequenceBuilder, step: int
) -> tuple[str, Tensor, Tensor]:
    """Kind, ids and weights (B, S) of a step."""
    rng = np.random.default_rng([recipe.seed, step])
    kind = "draw" if rng.random() < recipe.draw_share else "read"
    shares = np.array([use.share if use.covers(step) else 0.0 for _, _, use in stock])
    source, codes, use = stock[rng.choice(len(stock), p=shares / shares.sum())]
    samples = []
    for index in rng.integers(source.count, size=recipe.batch_size):
        task, scene = source.scene(int(index))
        if kind == "draw":
            samples.append(builder.drawing(scene, use.words(scene, task, rng), codes[index], rng))
        else:
            samples.append(builder.reading(scene, codes[index], rng))
    return kind, *collate(samples, builder.vocabulary.pad)


def causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Plain causal attention by two batched products: with bfloat16 tiles about twice as fast as SDPA's CPU kernel."""
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1).reshape(-1, length, width) for x in (key, value))
    future = torch.full((length, length), -1e4, dtype=query.dtype).triu(1)
    scores = torch.baddbmm(
        future.expand(batch * heads, -1, -1), query.flatten(0, 1), key.transpose(1, 2), alpha=scaling
    )
    mixed = torch.bmm(scores.softmax(-1), value)
    return mixed.view(batch, heads, length, width).transpose(1, 2).contiguous(), None


def weighted_loss(
    model: Emu3ForCausalLM, run_layers: Callable[..., Tensor], ids_BS: Tensor, weights_BS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss by weight; the loss (N,) and the id (N,) of every target that counts."""
    with autocast():
        positions = torch.arange(ids_BS.shape[1] - 1, device=ids_BS.device)[None]
        hidden = run_layers(model.model.embed_tokens(ids_BS[:, :-1]), None, positions)
        counts = weights_BS[:, 1:] > 0
        logits_NV = model.lm_head(hidden[counts])
    targets_N, weights_N = ids_BS[:, 1:][counts], weights_BS[:, 1:][counts]
    losses_N = F.cross_entropy(logits_NV.float(), targets_N, reduction="none")
    return (losses_N * weights_N).sum() / weights_N.sum(), losses_N.detach(), targets_N


@torch.no_grad()
def share_factors(model: Emu3ForCausalLM, vocabulary: Vocabulary, factors: Sequence[int]) -> None:
    """Starts each visual id as the sum of a vector for each of its code's factors, in embedding and head.

    So a shape in one colour says from the start what it is in another, and need not be learned for each.

    Args:
        factors: sizes, the one that varies slowest with the code first.

    Raises:
        ValueError: the factors do not multiply to the size of the codebook.
    """
    if math.prod(factors) != vocabulary.codebook_size:
        raise ValueError(
            f"code_factors {list(factors)} do not multiply to the {vocabulary.codebook_size} codes there are"
        )
    for table in (model.model.embed_tokens.weight, model.lm_head.weight):
        visual = table[slice(*vocabulary.visual_span)]
        scale = float(visual.std()) / len(factors) ** 0.5
        total = torch.zeros(*factors, table.shape[1])
        for axis, size in enumerate(factors):
            shape = [size if other == axis else 1 for other in range(len(factors))]
            total += scale * torch.randn(*shape, table.shape[1])
        visual.copy_(total.flatten(0, -2))


def optimizers_for(model: nn.Module, recipe: LanguageRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for all else."""
    matrices = [p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if not (".layers." in name and p.ndim == 2)]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=recipe.embedding_learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_factor(recipe: LanguageRecipe, step: int) -> float:
    """Share of the full learning rate: rising, flat, then falling to zero over the last `decay_share` of the steps."""
    falling = (recipe.steps - step) / max(1.0, recipe.decay_share * recipe.steps)
    return min(1.0, (step + 1) / recipe.warmup, falling)


def train(recipe: LanguageRecipe, folder: Path) -> None:
    """Runs the recipe to its end, from its last saved state if there is one; leaves tokenizer and model in `folder`."""
    sources = [split_source(entry) for entry in recipe.sources]
    for step in range(recipe.steps):
        if not any(use.covers(step) for _, use in sources):
            raise ValueError(f"no source of scenes for step {step}; add a [[sources]] table with share, seed and count")
    torch.manual_seed(recipe.seed)
    device = training_device()
    vision = Emu3VQVAE.from_pretrained(made_before(folder / recipe.vision)).to(device)
    tokenizer = text_tokenizer(recipe, folder, vision.config.codebook_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    vocabulary = Vocabulary.from_map(vocabulary_map(tokenizer))
    config = Emu3TextConfig(
        **recipe.model,
        vocab_size=len(tokenizer),
        pad_token_id=vocabulary.pad,
        bos_token_id=vocabulary.bos,
        eos_token_id=vocabulary.eos,
    )
    model = Emu3ForCausalLM(config)
    if recipe.code_factors is not None:
        share_factors(model, vocabulary, recipe.code_factors)
    model.to(device)
    if device.type == "cpu":
        ALL_ATTENTION_FUNCTIONS.register("emu3_causal", cast(Any, causal_attention))
        config._attn_implementation = "emu3_causal"
    run_layers = model.model.run_layers
    if recipe.compile and device.type == "cpu":
        run_layers = torch.compile(run_layers)
    stock = [(source, encoded(vision, source, folder / "codes"), use) for source, use in sources]
    builder = SequenceBuilder(tokenizer, vocabulary, Weights(**recipe.weights), turns=recipe.turns)
    optimizers = optimizers_for(model, recipe)
    step = load_state(folder, model, optimizers)
    log = Log(folder)
    log.begin(step, recipe.steps, recipe.report_every)
    began, tokens = time.monotonic(), 0
    recent: dict[str, list[float]] = {"draw": [], "read": [], "answer": []}  # losses: drawn and read pictures, answers
    model.train()
    for kind, ids, weights in made_ahead(partial(batch, recipe, stock, builder), range(step, recipe.steps)):
        # What is drawn at random depends on the step alone, so that a resumed run goes on bit for bit.
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        for optimizer, rate in zip(optimizers, (recipe.learning_rate, recipe.embedding_learning_rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_factor(recipe, step)
            optimizer.zero_grad(set_to_none=True)
        loss, losses, targets = weighted_loss(model, run_layers, ids.to(device), weights.to(device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        tokens += ids.numel()
        visual = targets >= vocabulary.visual_base
        if visual.any():
            recent[kind].append(float(losses[visual].mean()))
        if kind == "read":
            recent["answer"].append(float(losses[targets < vocabulary.pad].mean()))
        if step % recipe.report_every == 0:
            means = {name: float(np.mean(values)) for name, values in recent.items() if values}
            log.write(step=step, **means, tokens_per_second=int(tokens / (time.monotonic() - began)))
            recent = {name: [] for name in recent}
        if step % recipe.save_every == 0 or step == recipe.steps:
            save_state(folder, step, model, optimizers)
    model.eval()
    config._attn_implementation = "sdpa"
    model.save_pretrained(folder / "language")
