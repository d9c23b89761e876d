"""Training a language model on shards of samples, from scratch or from a checkpoint: all weights, or adapters (LoRA).

AdamW trains all; or Muon (Jordan et al., 2024) the matrices of the layers, and AdamW the rest. After a warm-up the rate
is constant, and over the last part it falls linearly to zero, so that a run can be extended from before the fall.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from emu3.checkpoints import resolve
from emu3.checkpoints.load import load_model, load_processor
from emu3.checkpoints.vision import load_vision_tokenizer
from emu3.configuration import Emu3Config, Emu3TextConfig
from emu3.data.samples import Sample
from emu3.data.shards import Shard, open_shards
from emu3.data.tokenize import INDEPENDENT, tokenizer_hash
from emu3.image_processing import Emu3ImageProcessor
from emu3.layout import ClipText
from emu3.learned import words_in
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.modeling.vision import Emu3VQVAE
from emu3.options import ABILITIES, GUIDANCE, Draw
from emu3.processing import Emu3Processor
from emu3.segments import Text
from emu3.tokenization import train_tokenizer, vocabulary_map
from emu3.training.adapters import MATRICES, add_adapters
from emu3.training.drawings import Drawings
from emu3.training.loop import Hook, rate_factor, run_loop
from emu3.training.machine import computes_in
from emu3.training.objective import NextTokenLoss, Rows
from emu3.training.packing import NEVER, MixedSource, Schedule
from emu3.training.recipe import Arguments, Checked, RunSettings
from emu3.training.results import add_words, configured_dtype, save_adapter, save_checkpoint, stored_dtype
from emu3.training.sequences import SequenceBuilder, Weights
from emu3.training.state import require_output, saved_states
from emu3.vocabulary import Vocabulary

MOST_TEXTS = 100_000  # different ones, that train a text tokenizer


@dataclass(frozen=True, kw_only=True)
class MixedShards(Checked):
    """A folder of shards in a mixture.

    Attributes:
        path: the folder, as `emu3 tokenize` leaves it.
        weight: its share of the samples, relative to the others in use.
        steps: the first step that uses it and the one after the last; None: all steps do.
        held: where it is not 0, the samples are what the checkpoint itself made, and adapters are held to what it
            expects there: so many times as much as another token counts the divergence from it.
        moved: whether something on a plain ground is drawn at another place each time.
    """

    path: Path
    weight: float = 1.0
    steps: tuple[int, int] | None = None
    held: float = 0.0
    moved: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight is {self.weight}; give a number above 0, or leave the data out")


@dataclass(frozen=True, kw_only=True)
class DrawingSettings(Checked):
    """The guidance that a checkpoint recommends; see `emu3.options.Draw`."""

    guidance_scale: float | None = None
    guidance_floor: float | None = None
    guidance_agreement: float | None = None

    def __post_init__(self) -> None:
        Draw(**{name: getattr(self, name) for name in GUIDANCE})  # refuses wrong ones


@dataclass(frozen=True, kw_only=True)
class ClipSettings(DrawingSettings):
    """What clips are like, unless a request says otherwise: their frames, how many of them a second, their guidance.

    What is not given of the guidance is that of pictures. `independent_groups` is true where the data were tokenized
    so, see `emu3.data.tokenize.Tokenizer`. `lengths` are all numbers of frames that the data have.
    """

    frames: int | None = None
    fps: float | None = None
    independent_groups: bool | None = None
    lengths: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class PictureSettings(Checked):
    """The smallest and the largest area of pictures that are read, as of `Emu3ImageProcessor`."""

    min_pixels: int = 512 * 512
    max_pixels: int = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe(RunSettings):
    """What every run of a language model has. A part of a step is one row of packed samples.

    Attributes:
        data: the shards.
        task: which samples count: drawings, all others ("chat"), or both.
        length: tokens of a row.
        weights: of the kinds of tokens in the loss.
        null_prompt: share of drawings whose prompt is left out, so that guidance has an unconditional model.
        optimizer: of the layers' matrices.
        learning_rate: of the layers' matrices, at its highest.
        embedding_learning_rate: of all other weights (AdamW); None: the same.
        weight_decay: of the layers' matrices.
        warmup: steps of rising rate.
        decay_share: share of the steps with falling rate.
        prompts: what is drawn to watch the run, with seeds 0, 1, ...; by default the first captions of the data.
        draw_every: steps between two sheets of drawings; 0: none.
    """

    data: tuple[MixedShards, ...]
    task: Literal["draw", "chat", "both"] = "both"
    length: int = 4096
    weights: Weights = field(default_factory=Weights)
    null_prompt: float = 0.1
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-4
    embedding_learning_rate: float | None = None
    weight_decay: float = 0.05
    warmup: int = 100
    decay_share: float = 0.4
    prompts: tuple[str, ...] = ()
    draw_every: int = 500


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(LanguageRecipe):
    """A language model from scratch, beside a vision tokenizer that is trained already.

    Attributes:
        model: arguments of `Emu3TextConfig`; ids and vocabulary size come from the tokenizer.
        vision: folder of the vision tokenizer.
        tokenizer: folder of a text tokenizer with ids for the visual codes; None: one is trained on the samples' texts.
        text_entries: size of the text tokenizer that is trained.
        texts: files that train it too.
        code_factors: sizes of the factors whose product is the size of the codebook; see `share_factors`.
        image_area: size of drawn pictures in pixels, unless a request names another.
        abilities: what the data teach, of `emu3.options.ABILITIES`; other uses are refused.
        drawing: how pictures are drawn, unless a request says otherwise.
        clips: what clips are like.
        image_processor: for pictures that are read.
    """

    model: Annotated[dict[str, Any], Arguments(Emu3TextConfig, rope_theta=float)]
    vision: Path
    tokenizer: Path | None = None
    text_entries: int = 1024
    texts: tuple[Path, ...] = ()
    code_factors: tuple[int, ...] | None = None
    image_area: int
    abilities: tuple[str, ...] = ("draw", "read")
    drawing: DrawingSettings = field(default_factory=DrawingSettings)
    clips: ClipSettings = field(default_factory=ClipSettings)
    image_processor: PictureSettings = field(default_factory=PictureSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_abilities(self.abilities)


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(LanguageRecipe):
    """All weights of a checkpoint's language model; its vision tokenizer stays as it is.

    Attributes:
        checkpoint: a name, as for `emu3 image --model`.
        abilities: what the result can do, of `emu3.options.ABILITIES`; by default what the checkpoint says.
    """

    checkpoint: str
    abilities: tuple[str, ...] | None = None
    learning_rate: float = 2e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_abilities(self.abilities)


@dataclass(frozen=True, kw_only=True)
class LoraRecipe(FinetuneRecipe):
    """Adapters of low rank beside the matrices of a checkpoint's layers, which stay as they are (Hu et al., 2021).

    Attributes:
        rank: of the adapters.
        alpha: an adapter's result counts alpha / rank.
        dropout: of the adapters' inputs.
        modules: names of the matrices, as PEFT reads `target_modules`.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    modules: tuple[str, ...] = MATRICES
    learning_rate: float = 2e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.abilities is not None:
            raise ValueError("abilities are those of the checkpoint that is adapted; leave them out")


def _check_abilities(names: Sequence[str] | None) -> None:
    if wrong := [name for name in names or () if name not in ABILITIES]:
        raise ValueError(f"abilities has {wrong[0]!r}; the abilities are {', '.join(ABILITIES)}")


def pretrain(recipe: PretrainRecipe, folder: Path) -> None:
    """Trains by the recipe, from the last saved state if any; leaves a checkpoint in the folder."""
    vision = load_vision_tokenizer(require_output(recipe.vision))
    shards = open_mixture(recipe, vision, vars(recipe.clips))
    torch.manual_seed(recipe.seed)
    if saved_states(folder):  # its ids are those of the weights
        tokenizer = AutoTokenizer.from_pretrained(folder.resolve())
    else:
        tokenizer = _text_tokenizer(recipe, shards, vision.config.codebook_size)
    names = vocabulary_map(tokenizer)
    vocabulary = Vocabulary.from_map(names)
    ids = {"pad_token_id": vocabulary.pad, "bos_token_id": vocabulary.bos, "eos_token_id": vocabulary.eos}
    text_config = Emu3TextConfig(**recipe.model, vocab_size=len(tokenizer), **ids)
    config = Emu3Config(vq_config=vision.config, text_config=text_config, vocabulary_map=names)
    config.abilities = list(recipe.abilities)
    for name in ("drawing", "clips"):
        if given := {key: value for key, value in asdict(getattr(recipe, name)).items() if value is not None}:
            setattr(config, name, given)
    model = Emu3ForConditionalGeneration(config)
    model.model.vqmodel.load_state_dict(vision.state_dict())
    model.generation_config = GenerationConfig(**ids)
    if recipe.code_factors is not None:
        share_factors(model, vocabulary, recipe.code_factors)
    factor, areas = vision.spatial_scale_factor, vars(recipe.image_processor)
    pictures = Emu3ImageProcessor(spatial_factor=factor, image_mean=[0.5] * 3, image_std=[0.5] * 3, **areas)
    processor = Emu3Processor(pictures, tokenizer, image_area=recipe.image_area)
    processor.save_pretrained(folder)
    train(recipe, folder, model, processor, shards)
    save_checkpoint(model, processor, folder, torch.float32)


def finetune(recipe: FinetuneRecipe, folder: Path) -> None:
    """Trains by the recipe, from the last saved state if any; leaves a checkpoint in the folder."""
    source = resolve(recipe.checkpoint)
    model, processor = load_model(source, dtype=torch.float32), load_processor(source)
    if recipe.abilities is not None:
        model.config.abilities = list(recipe.abilities)
    shards = open_mixture(recipe, model.model.vqmodel, getattr(model.config, "clips", None))
    train(recipe, folder, model, processor, shards)
    if (clips := getattr(model.config, "clips", None) or {}).get("lengths"):
        factor = model.model.vqmodel.config.temporal_downsample_factor
        shapes = [shape for each in shards for shard in each for shape in shard.shapes]
        more = {factor * shape.frames for shape in shapes if shape.frames > 1}
        model.config.clips = clips | {"lengths": sorted({*clips["lengths"], *more})}
    save_checkpoint(model, processor, folder, stored_dtype(source), computed=configured_dtype(source))
    add_words(source, folder, words_drawn(shards))


def lora(recipe: LoraRecipe, folder: Path) -> None:
    """Trains by the recipe, from the last saved state if any; leaves an adapter in the folder."""
    source = resolve(recipe.checkpoint)
    dtype = "auto" if computes_in(recipe) is torch.bfloat16 else torch.float32
    model, processor = load_model(source, dtype=dtype), load_processor(source)
    torch.manual_seed(recipe.seed)
    adapted = add_adapters(model, recipe.rank, recipe.alpha, recipe.modules, recipe.dropout)
    shards = open_mixture(recipe, model.model.vqmodel, getattr(model.config, "clips", None))
    train(recipe, folder, model, processor, shards)
    save_adapter(adapted, recipe.checkpoint, folder)
    add_words(source, folder, words_drawn(shards))


def train(
    recipe: LanguageRecipe,
    folder: Path,
    model: Emu3ForConditionalGeneration,
    processor: Emu3Processor,
    shards: Sequence[Sequence[Shard]],
) -> None:
    """Trains the weights of the language model that need gradients, in place.

    ValueError where several processes would hold adapters to what the checkpoint expects: they would wait for each
    other wherever only some of their rows have such samples.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and any(each.held for each in recipe.data):
        raise ValueError("held samples are for one process; leave them out of data, or start one process")
    model.model.vqmodel.requires_grad_(False)
    builder = SequenceBuilder(processor, model.model.vocabulary, recipe.weights, ClipText.of(model.config))
    rows = make_rows(recipe, shards, builder, model.model.text_model.config.max_position_embeddings)
    own = [each for each, mixed in zip(shards, recipe.data, strict=True) if not mixed.held]
    watch = Drawings(model, processor, recipe.prompts or captions(own), folder / "drawings")
    hooks = [Hook(recipe.draw_every, watch.draw)] if recipe.draw_every and recipe.task != "chat" else []
    objective = NextTokenLoss(model)
    optimizers, rates = partial(make_optimizers, recipe), partial(learning_rates, recipe)
    changes = {edge for each in recipe.data if each.steps for edge in each.steps}
    run_loop(recipe, folder, objective, optimizers, rates, rows, unit="tokens", hooks=hooks, changes=changes)


def open_mixture(
    recipe: LanguageRecipe, tokenizer: Emu3VQVAE, clips: Mapping[str, Any] | None = None
) -> list[list[Shard]]:
    """The shards of each folder of the recipe.

    `ValueError` where one was made by another vision tokenizer, or has clips whose groups of frames are not encoded as
    the settings `clips` of the checkpoint say.
    """
    own, alone = tokenizer_hash(tokenizer), bool((clips or {}).get("independent_groups"))
    mixture = [open_shards(each.path, own) for each in recipe.data]
    for each, opened in zip(recipe.data, mixture, strict=True):
        for shard in opened:
            if (INDEPENDENT in shard.info.settings) != alone and any(shape.frames > 1 for shape in shard.shapes):
                raise ValueError(
                    f"{str(each.path)!r} has clips whose groups of frames are encoded "
                    f"{'together' if alone else 'on their own'}; tokenize them anew, or set independent_groups to "
                    f"{'false' if alone else 'true'} under clips, in the recipe or the checkpoint's config.json"
                )
    return mixture


def make_rows(
    recipe: LanguageRecipe, shards: Sequence[Sequence[Shard]], builder: SequenceBuilder, context: int
) -> Rows:
    """The rows of a run. Left out is what is not of the recipe's task, and what is longer than the context or a row."""
    lengths: dict[Path, NDArray[Any]] = {}  # a folder may be there for several spans of steps
    for each, opened in zip(recipe.data, shards, strict=True):
        if each.path not in lengths:
            lengths[each.path] = lengths_of(opened, builder, recipe.task)
            long = int((lengths[each.path] > min(context, recipe.length)).sum())
            if long:
                limit = f"the context of {context}" if context <= recipe.length else f"a row of {recipe.length}"
                print(f"{each.path}: {long} samples are longer than {limit} tokens, and left out")
            unfit = (lengths[each.path] > context) | (lengths[each.path] < 0)
            lengths[each.path][unfit] = NEVER
    sources = [MixedSource(str(each.path), lengths[each.path], each.weight, each.steps) for each in recipe.data]
    schedule = Schedule(sources, recipe.length, recipe.parts, recipe.seed, recipe.steps)
    held, moved = [each.held for each in recipe.data], [each.moved for each in recipe.data]
    return Rows(schedule, shards, builder, recipe.null_prompt, held, moved)


def lengths_of(shards: Sequence[Shard], builder: SequenceBuilder, task: str) -> NDArray[Any]:
    """Tokens of each sample; -1 for one that is not of the task, or that the checkpoint's layout cannot spell."""
    lengths: list[int] = []
    unspelled: list[str] = []
    for sample in (sample for shard in shards for sample in shard.outlines()):
        lengths.append(-1)
        if task in ("both", "draw" if _draws(sample) else "chat"):
            try:
                lengths[-1] = len(builder.build(sample))
            except ValueError as error:
                unspelled.append(f"{sample.key}: {error}")
    if unspelled:
        print(f"{len(unspelled)} samples cannot be spelled, and are left out, such as {unspelled[0]}")
    return np.array(lengths)


def _draws(sample: Sample) -> bool:
    return any(part.role == "draw" for part in sample.parts)


def captions(shards: Sequence[Sequence[Shard]], count: int = 8) -> list[str]:
    """The first different prompts of drawings."""
    found: dict[str, None] = {}
    for prompt in _prompts(shards):
        found[prompt] = None
        if len(found) == count:
            break
    return list(found)


def words_drawn(shards: Sequence[Sequence[Shard]]) -> Iterator[str]:
    """The words of all prompts of drawings, as often as they are there."""
    return (word for prompt in _prompts(shards) for word in words_in(prompt))


def _prompts(shards: Sequence[Sequence[Shard]]) -> Iterator[str]:
    for shard in (shard for each in shards for shard in each):
        for sample in shard.outlines():
            words = [part.content.text for part in sample.parts if isinstance(part.content, Text)]
            if words and _draws(sample):
                yield " ".join(words)


def _text_tokenizer(
    recipe: PretrainRecipe, shards: Sequence[Sequence[Shard]], codebook_size: int
) -> PreTrainedTokenizerBase:
    if recipe.tokenizer is not None:
        return AutoTokenizer.from_pretrained(recipe.tokenizer.resolve())
    texts: dict[str, None] = {}
    for shard in (shard for each in shards for shard in each):
        for sample in shard.outlines():
            texts |= {part.content.text: None for part in sample.parts if isinstance(part.content, Text)}
            if len(texts) > MOST_TEXTS:
                break
    files = [path.read_text() for path in recipe.texts]
    return train_tokenizer([*texts, *files], recipe.text_entries, codebook_size)


@torch.no_grad()
def share_factors(model: Emu3ForConditionalGeneration, vocabulary: Vocabulary, factors: Sequence[int]) -> None:
    """Starts each visual id, in embedding and head, as the sum of one vector for each factor of its code.

    Codes that share a factor then start alike, so what is learned of one holds for the others. The factor that varies
    slowest with the code comes first.
    """
    if math.prod(factors) != vocabulary.codebook_size:
        raise ValueError(f"code_factors {list(factors)} do not multiply to the {vocabulary.codebook_size} codes")
    for table in (model.get_input_embeddings().weight, model.lm_head.weight):
        visual = table[slice(*vocabulary.visual_span)]
        scale = float(visual.std()) / len(factors) ** 0.5
        total = torch.zeros(*factors, table.shape[1])
        for axis, size in enumerate(factors):
            faster = [1] * (len(factors) - axis - 1)
            total += scale * torch.randn(size, *faster, table.shape[1])
        visual.copy_(total.flatten(0, -2))


def make_optimizers(recipe: LanguageRecipe, model: nn.Module) -> list[torch.optim.Optimizer]:
    """That of the layers' matrices, and AdamW for all else; of the weights that need gradients."""
    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    matrices = [each for name, each in trained if ".layers." in name and each.ndim == 2]
    rest = [each for name, each in trained if ".layers." not in name or each.ndim != 2]
    rate, decay = recipe.learning_rate, recipe.weight_decay
    made: list[torch.optim.Optimizer] = []
    if recipe.optimizer == "muon":
        made.append(torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    else:
        made.append(torch.optim.AdamW(matrices, lr=rate, betas=(0.9, 0.95), weight_decay=decay))
    if rest:
        made.append(torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.95), weight_decay=0.0))
    return made


def learning_rates(recipe: LanguageRecipe, step: int) -> list[float]:
    """The rates of a step, of the layers' matrices and of all else: rising, flat, then falling to zero."""
    factor = rate_factor(step, recipe.steps, recipe.warmup, recipe.decay_share)
    other = recipe.learning_rate if recipe.embedding_learning_rate is None else recipe.embedding_learning_rate
    return [recipe.learning_rate * factor, other * factor]
