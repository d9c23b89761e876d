"""GRPO: draw several pictures of each prompt, reward them, and make the better ones of a group likelier.

The engine draws, guided and sampled as for a user, and says how likely every token was. A picture's advantage is its
reward less the mean of its group. It raises or lowers the probability of each token. The ratio of new to old is
clipped, and the distance to the model at the start costs something.

Groups whose pictures all earn the same teach nothing, and are not learned from.

Sources: Shao et al., arXiv 2402.03300. Two limits of the ratio, and a mean over tokens: Yu et al., arXiv 2503.14476. No
division by the deviation: Liu et al., arXiv 2503.20783. Only tokens with a choice: Wang et al., arXiv 2506.01939. The
estimate of the distance: the third of Schulman, "Approximating KL divergence".
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from emu3.generation.events import Failed, Finished
from emu3.generation.request import Request
from emu3.generation.sampling import Sampling
from emu3.pipeline import Emu3Pipeline
from emu3.training.adapters import merged_adapters
from emu3.training.loop import StepResult
from emu3.training.recipe import Checked
from emu3.training.scoring import Answers, Reference, Scores, score

Reward = Callable[[str, Image.Image], float]
"""(prompt, picture) -> how good it is; 1 for one that is right."""

GroupReward = Callable[[str, Sequence[Image.Image]], list[float]]
"""(prompt, its pictures) -> what each adds to its group: such as how different it is from the others."""


def load_function(name: str) -> Callable[..., Any]:
    """The function that "module:function" names; a module may be a file of the current folder.

    ValueError where there is none.
    """
    module, colon, function = name.partition(":")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.append(folder)
    try:
        found = getattr(import_module(module), function) if colon else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name!r} cannot be imported: {error}; give module:function") from error
    if not callable(found):
        raise ValueError(f"{name!r} is no function; give module:function, such as emu3.icons.rewards:strict")
    return cast(Callable[..., Any], found)


@dataclass(frozen=True, kw_only=True)
class GRPOSettings(Checked):
    """How groups are drawn and learned from.

    Attributes:
        group: pictures of each prompt.
        guidance_scale, guidance_floor, guidance_agreement, temperature, top_k, top_p, decoding: how they are drawn; see
            `emu3.options.Draw`.
        clip_low, clip_high: by how much a token's probability may fall or rise, as a share, before it stops to count.
        kl: weight of the distance to the start.
        entropy: weight of the entropy that is added as a reward; 0: none.
        divide: whether advantages are divided by the deviation in the group.
        group_reward: weight of what the group reward adds.
        critical: the share of tokens that count: those where the model was least sure.
        most_groups: of a batch, of which it is learned: those whose rewards differ most. Drawing is cheaper.
        reuse: updates for which drawn pictures are used.
    """

    group: int = 8
    guidance_scale: float | None = None
    guidance_floor: float | None = None
    guidance_agreement: float | None = None
    temperature: float = 1.0
    top_k: int = 2048
    top_p: float = 1.0
    decoding: str = "predictive"
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl: float = 0.02
    entropy: float = 0.0
    divide: bool = False
    group_reward: float = 0.0
    critical: float = 1.0
    most_groups: int | None = None
    reuse: int = 1

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(self.temperature, self.top_k, self.top_p)


class PromptBatch(NamedTuple):
    """Prompts to draw a group of pictures of each.

    Attributes:
        rollout: a number. The pictures of all its parts are drawn with the same weights, and are used again as long as
            batches of this number come.
        part: of the rollout.
        prompts: words.
        seed: of the pictures.
    """

    rollout: int
    part: int
    prompts: list[str]
    seed: int


class Drawn(NamedTuple):
    """Pictures as they were drawn: requests, what they came to, rewards (prompts, group), and metrics."""

    requests: list[Request]
    answers: list[Finished]
    rewards_PG: Tensor
    metrics: dict[str, tuple[float, float]]


class Rollout(NamedTuple):
    """Pictures that were drawn, as far as they are learned from; `answers` is None where none are.

    Attributes:
        answers: the pictures of groups that differ in reward.
        old, reference: the logarithm of each token's probability (T,) when it was drawn, and at the start.
        advantages: of each token's picture, (T,).
        counts: whether a token counts, (T,).
        metrics: of all pictures, drawn and left out.
    """

    answers: Answers | None
    old: Tensor
    reference: Tensor | None
    advantages: Tensor
    counts: Tensor
    metrics: dict[str, tuple[float, float]]


def advantages_of(rewards_PG: Tensor, divide: bool) -> Tensor:
    """Each reward (prompts, group) less the mean of its group; divided by the deviation in the group if asked."""
    centred = rewards_PG - rewards_PG.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True).sqrt() + 1e-6) if divide else centred


def groups_to_learn(rewards_PG: Tensor, most: int | None) -> list[int]:
    """The groups whose rewards (prompts, group) differ, those first that differ most, and no more than so many."""
    deviations = rewards_PG.std(1, correction=0)
    order = deviations.argsort(descending=True, stable=True).tolist()
    return [group for group in order if deviations[group] > 1e-6][:most]


def policy_losses(
    scores: Scores, old_T: Tensor, advantages_T: Tensor, settings: GRPOSettings, reference_T: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss (T,) of every token, and numbers (T,) for the log: kl, clipped, entropy, ratio."""
    new_T = scores.log_probabilities
    ratio_T = (new_T - old_T).exp()
    clipped_T = ratio_T.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    gain_T = torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)
    loss_T = -gain_T - settings.entropy * scores.entropies
    metrics = {
        "clipped": (gain_T < ratio_T * advantages_T).float(),
        "entropy": scores.entropies.detach(),
        "moved": (new_T - old_T).abs().detach(),
    }
    if reference_T is not None:
        # The ratio makes it a mean over pictures of the model as it is, not as it drew. Without it, a token that has
        # become rare counts by the inverse of its probability, and drowns all else.
        away_T = reference_T - new_T
        kl_T = ratio_T * (away_T.exp() - away_T - 1)
        loss_T = loss_T + settings.kl * kl_T
        metrics["kl"] = kl_T.detach()
    return loss_T, metrics


class GRPO(nn.Module):
    """The objective: `forward` draws the pictures of a batch when it first sees it, and gives their loss.

    The model stays in evaluation mode, so that a token's new probability compares with its old one.

    Args:
        pipeline: whose model is trained, and draws.
        settings: see there.
        reward: of a picture.
        reference: the model at the start; None: no distance is computed.
        group_reward: see `GroupReward`.
    """

    def __init__(
        self,
        pipeline: Emu3Pipeline,
        settings: GRPOSettings,
        reward: Reward,
        reference: Reference | None = None,
        group_reward: GroupReward | None = None,
    ) -> None:
        super().__init__()
        self.model = pipeline.model
        self.settings, self.reward, self.group_reward = settings, reward, group_reward
        # Not parts of this module: neither their weights are trained, nor are they saved.
        self._others = pipeline, reference
        self._rollout = -1
        self._parts: dict[int, Rollout] = {}
        self._drawn_at: float | None = None
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Always evaluation mode."""
        return super().train(False)

    def forward(self, batch: PromptBatch) -> StepResult:
        """The loss of a batch."""
        metrics = {}
        if self._drawn_at is not None:  # with the backward pass, and with the update if one was due
            metrics["seconds_learning"] = torch.tensor(time.monotonic() - self._drawn_at), torch.tensor(1.0)
        if batch.rollout != self._rollout:
            self._rollout = batch.rollout
            self._parts.clear()
        first = batch.part not in self._parts
        if first:
            # As a user draws: the weights with their adapters, in their own precision.
            with merged_adapters(self.model), torch.autocast(self.model.lm_head.weight.device.type, enabled=False):
                self._others[0].engine.refresh()
                drawn = self.draw(batch)
            self._parts[batch.part] = self.score(drawn)
        self._drawn_at = time.monotonic()
        rollout = self._parts[batch.part]
        device = self.model.lm_head.weight.device
        metrics |= {
            name: (torch.tensor(float(total), device=device), torch.tensor(float(count), device=device))
            for name, (total, count) in (rollout.metrics.items() if first else ())
        }
        if rollout.answers is None:
            # Counts as a token without a loss: a step of such batches changes nothing, and divides by no zero.
            nothing = next(each for each in self.parameters() if each.requires_grad).sum() * 0
            return StepResult(nothing, torch.ones((), device=device), metrics, 0)
        scores = score(self.model, rollout.answers, self.settings.sampling)
        losses_T, of_tokens = policy_losses(scores, rollout.old, rollout.advantages, self.settings, rollout.reference)
        weight = rollout.counts.sum()
        of_tokens["loss"] = losses_T.detach()
        metrics |= {name: ((values_T * rollout.counts).sum(), weight) for name, values_T in of_tokens.items()}
        return StepResult((losses_T * rollout.counts).sum(), weight, metrics, rollout.answers.ids_BS.numel())

    @torch.no_grad()
    def draw(self, batch: PromptBatch) -> Drawn:
        """Draws a group of pictures of each prompt, and rewards them. The engine has read the model's weights."""
        pipeline, settings = self._others[0], self.settings
        words = [prompt for prompt in batch.prompts for _ in range(settings.group)]
        began = time.monotonic()
        requests = pipeline.draw_requests(
            words,
            guidance_scale=settings.guidance_scale,
            guidance_floor=settings.guidance_floor,
            guidance_agreement=settings.guidance_agreement,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            decoding=settings.decoding,
            seed=batch.seed,
        )
        requests = [replace(request, log_probabilities=True) for request in requests]
        finished: dict[int, Finished] = {}
        for event in pipeline.engine.stream(requests):
            if isinstance(event, Failed):
                raise ValueError(event.error)
            if isinstance(event, Finished):
                finished[event.request] = event
        answers = [finished[number] for number in range(len(requests))]
        pictures = [
            cast(Image.Image, pipeline.read(request, answer.ids))
            for request, answer in zip(requests, answers, strict=True)
        ]
        seconds = time.monotonic() - began
        rewards = [float(self.reward(*pair)) for pair in zip(words, pictures, strict=True)]
        rewards_PG = torch.tensor(rewards).view(-1, settings.group)
        differ = (rewards_PG != rewards_PG[:, :1]).any(1)
        metrics: dict[str, tuple[float, float]] = {
            "reward": (sum(rewards), len(rewards)),
            "right": (sum(reward >= 1 for reward in rewards), len(rewards)),
            "groups_that_differ": (int(differ.sum()), len(differ)),
            "seconds_drawing": (seconds, 1),
        }
        if self.group_reward is not None:
            groups = [pictures[start : start + settings.group] for start in range(0, len(words), settings.group)]
            added_PG = torch.tensor([self.group_reward(*pair) for pair in zip(batch.prompts, groups, strict=True)])
            metrics["group_reward"] = (float(added_PG.sum()), len(rewards))
            rewards_PG = rewards_PG + settings.group_reward * added_PG
        return Drawn(requests, answers, rewards_PG, metrics)

    @torch.no_grad()
    def score(self, drawn: Drawn) -> Rollout:
        """What a batch's drawn pictures teach."""
        settings, reference = self.settings, self._others[1]
        groups = groups_to_learn(drawn.rewards_PG, settings.most_groups)
        kept = [n for group in groups for n in range(group * settings.group, (group + 1) * settings.group)]
        if not kept:
            nothing = torch.empty(0)
            return Rollout(None, nothing, None, nothing, nothing, drawn.metrics)
        device, pad = self.model.lm_head.weight.device, self.model.model.vocabulary.pad
        ids = [drawn.answers[n].ids for n in kept]
        answers = Answers.of([drawn.requests[n] for n in kept], ids, pad).to(device)
        old_T = np.concatenate([_of_choices(drawn.requests[n], drawn.answers[n]) for n in kept])
        advantages_PG = advantages_of(drawn.rewards_PG, settings.divide)
        advantages_T = advantages_PG.flatten()[kept].to(device)[answers.own]
        counts_T, reference_T = torch.ones_like(advantages_T), None
        if settings.critical < 1:
            entropies_T = score(self.model, answers, settings.sampling).entropies
            counts_T = (entropies_T >= entropies_T.quantile(1 - settings.critical)).float()
        if reference is not None:
            reference_T = reference.score(answers, settings.sampling).log_probabilities
        return Rollout(answers, torch.from_numpy(old_T).to(device), reference_T, advantages_T, counts_T, drawn.metrics)


def _of_choices(request: Request, answer: Finished) -> NDArray[np.float32]:
    """The logarithm of the probability of each token for which the grammar left a choice."""
    assert answer.log_probabilities is not None, answer
    lo, hi = request.grammar.span(np.arange(len(answer.ids)))
    return answer.log_probabilities[np.broadcast_to(hi > lo + 1, len(answer.ids))]
