"""DPO: from pairs of pictures of the same words, one of which is preferred, learn to draw more like that one.

The loss is that of a classifier. It tells the preferred picture of a pair by how much likelier the model finds it than
it did at the start:

    margin = beta * ((chosen - chosen at the start) - (rejected - rejected at the start))
    loss = -log sigmoid(margin)

where each is the logarithm of a whole picture's probability: the sum over the tokens for which the grammar leaves a
choice, in the distribution that is drawn from.

Source: Rafailov et al., arXiv 2305.18290.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emu3.data.samples import Part, Sample
from emu3.data.shards import Shard, ShardInfo, shard_name, write_shard
from emu3.data.tokenize import tokenizer_hash
from emu3.generation.grammar import GridGrammar
from emu3.generation.request import Guidance, Request
from emu3.generation.sampling import Sampling
from emu3.layout import Layout
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.modeling.vision import Emu3VQVAE
from emu3.segments import Shape, Text, Visual
from emu3.training.loop import StepResult
from emu3.training.recipe import Checked
from emu3.training.scoring import Answers, Reference, score


@dataclass(frozen=True, kw_only=True)
class DPOSettings(Checked):
    """What is compared, and how strongly.

    Attributes:
        beta: how much a change from the start counts; the lower, the further the model may go.
        guidance_scale, guidance_floor, guidance_agreement: of the distribution that is learned; a scale of 1, half the
            work, learns the conditional one.
        temperature, top_k, top_p: of that distribution.
        sft: weight of the mean loss of the chosen picture's tokens, which keeps it likely.
    """

    beta: float = 0.1
    guidance_scale: float = 1.0
    guidance_floor: float = 0.0
    guidance_agreement: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    sft: float = 0.0

    @property
    def sampling(self) -> Sampling:
        """How tokens would be chosen."""
        return Sampling(self.temperature, self.top_k, self.top_p)


class Pair(NamedTuple):
    """Two pictures of the same words, of which the first is preferred; `key` names the pair."""

    key: str
    prompt: str
    chosen: Visual
    rejected: Visual


def pair_of(sample: Sample) -> Pair:
    """The pair in a sample of three parts: the words, the picture to draw, and one to draw that is not trained on.

    Raises:
        ValueError: a sample of another form.
    """
    roles = [(part.role, part.train) for part in sample.parts]
    contents: list[Any] = [part.content for part in sample.parts]
    if roles[1:] != [("draw", True), ("draw", False)] or not isinstance(contents[0], Text):
        raise ValueError(
            f"sample {sample.key!r} is no pair: give it a prompt, the preferred picture, and the other one with "
            "train = false"
        )
    return Pair(sample.key, contents[0].text, contents[1], contents[2])


def write_pairs(folder: Path, pairs: Sequence[Pair], tokenizer: Emu3VQVAE) -> None:
    """Writes pairs, whose codes `tokenizer` made, as a shard; a recipe's `data` names the folder."""
    size = tokenizer.config.codebook_size
    info = ShardInfo(tokenizer=tokenizer_hash(tokenizer), codebook_size=size, settings="pairs", source="pairs")
    samples = [
        Sample(
            each.key, (Part("prompt", Text(each.prompt)), Part("draw", each.chosen), Part("draw", each.rejected, False))
        )
        for each in pairs
    ]
    write_shard(folder / shard_name(0), info, samples)


class PairBatch(NamedTuple):
    """Pairs by their keys, and their pictures: first all chosen ones, then all rejected ones."""

    keys: list[str]
    answers: Answers


def batch_of(pairs: Sequence[Pair], layout: Layout, settings: DPOSettings) -> PairBatch:
    """A batch of pairs whose pictures may be of any sizes."""
    requests, ids = [], []
    for prompt, visual in chain(
        ((pair.prompt, pair.chosen) for pair in pairs), ((pair.prompt, pair.rejected) for pair in pairs)
    ):
        _, height, width = visual.codes_THW.shape
        shape = Shape(height, width)
        grammar = layout.grammar(shape)
        assert isinstance(grammar, GridGrammar), grammar
        guidance = None
        if settings.guidance_scale != 1:
            negative = tuple(layout.prompt("", shape))
            floor, agreement = settings.guidance_floor, settings.guidance_agreement
            guidance = Guidance(negative, settings.guidance_scale, floor=floor, agreement=agreement)
        requests.append(Request(tuple(layout.prompt(prompt, shape)), grammar, settings.sampling, guidance))
        ids.append(grammar.ids_of(np.asarray(visual.codes_THW)).tolist())
    return PairBatch([pair.key for pair in pairs], Answers.of(requests, ids, layout.vocabulary.pad))


@dataclass(frozen=True)
class PairBatches:
    """Makes the batches of a run from shards of pairs; picklable. The same step and part make the same batch.

    Attributes:
        paths: of the shards.
        layout: how the checkpoint spells pictures.
        settings: see there.
        seed: of the order.
        batch_size: pairs of a batch.
    """

    paths: tuple[Path, ...]
    layout: Layout
    settings: DPOSettings
    seed: int = 0
    batch_size: int = 4

    def __call__(self, step: int, part: int) -> PairBatch:
        """The batch of a step's part."""
        ends = list(accumulate(map(len, self._shards)))
        if not ends or not ends[-1]:
            raise ValueError(f"no pairs in {', '.join(map(str, self.paths)) or 'no shards'}")
        rng = np.random.default_rng([self.seed, step, part])
        pairs = []
        for index in rng.integers(ends[-1], size=self.batch_size).tolist():
            number = next(number for number, end in enumerate(ends) if index < end)
            pair = pair_of(self._shards[number][index - ends[number] + len(self._shards[number])])
            # Keys are those of one source.
            pairs.append(pair._replace(key=f"{number}:{index}:{pair.key}"))
        return batch_of(pairs, self.layout, self.settings)

    @cached_property
    def _shards(self) -> list[Shard]:
        return [Shard(path) for path in self.paths]

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, which open the shards themselves."""
        return {name: value for name, value in self.__dict__.items() if name != "_shards"}


def dpo_losses(
    chosen_P: Tensor, rejected_P: Tensor, chosen_start_P: Tensor, rejected_start_P: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """The loss and the margin (pairs,), from the logarithms of the probabilities of whole pictures."""
    margins_P = beta * ((chosen_P - chosen_start_P) - (rejected_P - rejected_start_P))
    return -F.logsigmoid(margins_P), margins_P


class DPO(nn.Module):
    """The objective: `forward` gives the loss of a batch of pairs.

    The model stays in evaluation mode, so that it compares with the model at the start, which scores a pair once.

    Args:
        model: that is trained.
        settings: see there.
        reference: the model at the start.
    """

    def __init__(self, model: Emu3ForConditionalGeneration, settings: DPOSettings, reference: Reference) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        self._reference = (reference,)  # not a part: its weights are neither trained nor saved
        self._start: dict[str, tuple[float, float]] = {}
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Always evaluation mode."""
        return super().train(False)

    def forward(self, batch: PairBatch) -> StepResult:
        """The loss of a batch."""
        device = self.model.lm_head.weight.device
        answers = batch.answers.to(device)
        start_P2 = self._start_of(batch.keys, answers)
        scores = score(self.model, answers, self.settings.sampling)
        chosen_P, rejected_P = answers.sums(scores.log_probabilities).chunk(2)
        losses_P, margins_P = dpo_losses(chosen_P, rejected_P, start_P2[:, 0], start_P2[:, 1], self.settings.beta)
        if self.settings.sft:
            lengths_P = answers.sums(torch.ones_like(scores.log_probabilities)).chunk(2)[0]
            losses_P = losses_P - self.settings.sft * chosen_P / lengths_P
        count = torch.tensor(float(len(batch.keys)), device=device)
        metrics = {
            "loss": losses_P,
            "margin": margins_P,
            "told_apart": (margins_P > 0).float(),
            "chosen_gain": chosen_P - start_P2[:, 0],
            "rejected_gain": rejected_P - start_P2[:, 1],
        }
        sums = {name: (values_P.detach().sum(), count) for name, values_P in metrics.items()}
        return StepResult(losses_P.sum(), count, sums, answers.ids_BS.numel())

    def _start_of(self, keys: Iterable[str], answers: Answers) -> Tensor:
        """How likely each picture was at the start, (pairs, 2)."""
        keys = list(keys)
        if not all(key in self._start for key in keys):
            (reference,) = self._reference
            sums = answers.sums(reference.score(answers, self.settings.sampling).log_probabilities)
            self._start |= dict(zip(keys, zip(*(half.tolist() for half in sums.chunk(2)), strict=True), strict=True))
        return torch.tensor([self._start[key] for key in keys], device=answers.ids_BS.device)
