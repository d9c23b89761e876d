"""How likely a model thinks that answers are, token by token, with gradients: what preferences are learned by.

The distribution is the one that the engine draws from: the legal ids, guided where the request is, after temperature,
top-k and top-p. Only tokens count for which the grammar leaves a choice.

    conditional    bos a red cat boi 12*12 img  v v v eol v v v eol ... eos pad
    unconditional  bos boi 12*12 img  v v v eol v v v eol ... eos pad pad pad pad

Shapes: B lanes, S tokens of a lane, E model width, V legal ids, T tokens with a choice, of all answers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from emu3.generation.request import Request
from emu3.generation.sampling import Guide, Sampling, restrict
from emu3.modeling.multimodal import Emu3ForConditionalGeneration
from emu3.training.adapters import without_adapters
from emu3.training.objective import attend_on_cpu

# Logits that are computed at once: all of them in float32 would take more memory than all else.
_ROWS_AT_ONCE = 4096


class Answers(NamedTuple):
    """Answers to requests that sample alike, as a batch of lanes and the tokens that count.

    Attributes:
        ids_BS: first every answer with its prompt; then, under guidance, every answer with its negative prompt. Padded
            on the right, where no other token sees the padding.
        own: the answer (T,) that a token belongs to.
        places: the input (T,) that decides it, in its answer's lane.
        negative_places: the same in the lane of the negative prompt; None without guidance.
        targets: the token (T,) as an index into the legal ids.
        scales: of guidance (T, 1); None without.
        floor, agreement: limits of guidance, for all.
        span: the legal ids, lo..hi-1.
        number: of answers.
    """

    ids_BS: Tensor
    own: Tensor
    places: Tensor
    negative_places: Tensor | None
    targets: Tensor
    scales: Tensor | None
    floor: float
    agreement: float
    span: tuple[int, int]
    number: int

    @classmethod
    def of(cls, requests: Sequence[Request], ids: Sequence[Sequence[int]], pad: int) -> Self:
        """The answers `ids` to requests of one kind, guided all or none. ValueError for others."""
        guided = {len(request.prompts) for request in requests}
        if len(guided) != 1:
            raise ValueError("answers that are compared are guided all or none; split the batch")
        (lanes,), guides = guided, [each.guidance for each in requests]
        limits = {(0.0, 0.0) if each is None else (each.floor, each.agreement) for each in guides}
        if len(limits) != 1:
            raise ValueError(
                "answers that are compared have one floor and one agreement of guidance, got "
                f"{sorted(limits)}; split the batch"
            )
        rows = [
            [*request.prompts[lane], *each]
            for lane in range(lanes)
            for request, each in zip(requests, ids, strict=True)
        ]
        longest = max(map(len, rows)) - 1  # nothing follows the last token
        ids_BS = torch.tensor([(row + [pad] * longest)[:longest] for row in rows])
        own, places, targets, scales, spans = [], [], [], [], set()
        for number, (request, each) in enumerate(zip(requests, ids, strict=True)):
            lo, hi = (np.broadcast_to(bound, len(each)) for bound in request.grammar.span(np.arange(len(each))))
            for k in (hi > lo + 1).nonzero()[0].tolist():
                own.append(number)
                places.append(k - 1)
                targets.append(each[k] - int(lo[k]))
                spans.add((int(lo[k]), int(hi[k])))
                scales.append(request.guidance_at(request.grammar, k))
        if len(spans) != 1:
            raise ValueError(f"answers that are compared have one span of legal ids, got {sorted(spans)}")
        if not all(0 <= target < spans_hi - spans_lo for spans_lo, spans_hi in spans for target in targets):
            raise ValueError("an answer holds an id that its grammar does not allow")
        starts = torch.tensor([[len(prompt) for prompt in request.prompts] for request in requests])
        own_T, places_T = torch.tensor(own), torch.tensor(places)
        return cls(
            ids_BS,
            own_T,
            starts[own_T, 0] + places_T,
            None if lanes == 1 else starts[own_T, 1] + places_T,
            torch.tensor(targets),
            None if lanes == 1 else torch.tensor([1.0 if scale is None else scale for scale in scales])[:, None],
            *limits.pop(),
            spans.pop(),
            len(requests),
        )

    def to(self, device: torch.device) -> Self:
        """All tensors there."""
        moved: dict[str, Any] = {
            name: each.to(device) for name, each in self._asdict().items() if isinstance(each, Tensor)
        }
        return self._replace(**moved)

    def sums(self, values_T: Tensor) -> Tensor:
        """The sum of the values of each answer's tokens, (answers,)."""
        return values_T.new_zeros(self.number).index_add(0, self.own, values_T)


class Scores(NamedTuple):
    """Of each token that counts: the logarithm of its probability, and the entropy of the distribution, both (T,)."""

    log_probabilities: Tensor
    entropies: Tensor


def score(model: Emu3ForConditionalGeneration, answers: Answers, sampling: Sampling) -> Scores:
    """Score answers, on the model's device. A token that `sampling` would not choose any more counts as if it did."""
    text_model, (lo, hi) = model.model.text_model, answers.span
    ids_BS = answers.ids_BS
    run_layers: Callable[..., Tensor] = text_model.run_layers
    if ids_BS.device.type == "cpu":
        run_layers = partial(run_layers, attend=attend_on_cpu)
    hidden_BSE = run_layers(text_model.embed_tokens(ids_BS), None, torch.arange(ids_BS.shape[1])[None].to(ids_BS))
    head = model.lm_head.weight[lo:hi]
    found: list[tuple[Tensor, Tensor]] = []
    for rows in torch.arange(len(answers.own), device=ids_BS.device).split(_ROWS_AT_ONCE):
        own, targets_T1 = answers.own[rows], answers.targets[rows, None]
        logits_TV, left_out_TV = (hidden_BSE[own, answers.places[rows]] @ head.T).float(), None
        if answers.negative_places is not None and answers.scales is not None:
            negative_TV = (hidden_BSE[own + answers.number, answers.negative_places[rows]] @ head.T).float()
            guide = Guide(answers.scales[rows], answers.floor, answers.agreement)
            logits_TV, left_out_TV = guide.logits(logits_TV, negative_TV)
        found.append(_scores_of(logits_TV, left_out_TV, targets_T1, sampling))
    log_probabilities, entropies = (torch.cat(each) for each in zip(*found, strict=True))
    return Scores(log_probabilities, entropies)


def _scores_of(
    logits_TV: Tensor, left_out_TV: Tensor | None, targets_T1: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    if sampling.temperature == 0:
        raise ValueError("answers that are drawn at temperature 0 leave nothing to learn; give one above 0")
    allowed_TV = logits_TV if left_out_TV is None else logits_TV.masked_fill(left_out_TV, -torch.inf)
    restricted_TV = restrict(allowed_TV, sampling)
    # Since it was drawn, other ids may have overtaken it. It stays among those that count.
    chosen_T1 = (logits_TV / sampling.temperature).gather(1, targets_T1)
    logs_TV = restricted_TV.scatter(1, targets_T1, chosen_T1).log_softmax(-1)
    entropies_T = -(logs_TV.exp() * logs_TV.masked_fill(logs_TV == -torch.inf, 0)).sum(-1)
    return logs_TV.gather(1, targets_T1)[:, 0], entropies_T


class Reference:
    """The model as it was at the start, which preferences must not lead far from.

    Args:
        model: that is trained.
        copy: its copy, frozen, where all weights are trained. None: the model's adapters are switched off instead.
    """

    def __init__(self, model: Emu3ForConditionalGeneration, copy: Emu3ForConditionalGeneration | None) -> None:
        self.model, self.copy = model, copy

    @torch.no_grad()
    def score(self, answers: Answers, sampling: Sampling) -> Scores:
        """`score`, by the model as it was."""
        if self.copy is not None:
            return score(self.copy, answers, sampling)
        with without_adapters(self.model):
            return score(self.model, answers, sampling)
