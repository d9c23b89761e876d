"""A patch discriminator: it tells reconstructions from originals, patch by patch, and the tokenizer tries to fool it.

The loss and its weight are those of VQGAN (Esser et al., 2021). Both sides are trained by one backward pass: the
tokenizer's part sees the discriminator's weights as constants, the discriminator's part sees the pictures as constants.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

_GROUPS = 8


class PatchDiscriminator(nn.Module):
    """Convolutions whose every output judges one patch: above zero says "original", below zero "reconstruction"."""

    def __init__(self, in_channels: int, channels: int, layers: int = 3) -> None:
        super().__init__()
        if channels % _GROUPS:
            raise ValueError(f"discriminator_channels is {channels}; give a multiple of {_GROUPS}")
        body: list[nn.Module] = [nn.Conv2d(in_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, layers + 1):
            wider = channels * 2 if layer < 3 else channels
            # Statistics of each picture alone, so that the judgement does not depend on the rest of the batch.
            body += [
                nn.Conv2d(channels, wider, 4, stride=2 if layer < layers else 1, padding=1, bias=False),
                nn.GroupNorm(_GROUPS, wider),
                nn.LeakyReLU(0.2),
            ]
            channels = wider
        self.body = nn.Sequential(*body, nn.Conv2d(channels, 1, 4, padding=1))

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Judgements (B, 1, H, W) of pictures of at least 32x32 pixels."""
        return self.body(pixels_BCHW)

    def judge_frozen(self, pixels_BCHW: Tensor) -> Tensor:
        """The same with the weights as constants: gradients reach the pictures only."""
        return functional_call(self, {name: each.detach() for name, each in self.named_parameters()}, (pixels_BCHW,))


def discriminator_loss(discriminator: PatchDiscriminator, pixels_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Hinge loss of each pair (B,). Gradients reach the discriminator only."""
    real, fake = discriminator(torch.cat((target_BCHW, pixels_BCHW)).detach()).flatten(1).chunk(2)
    return 0.5 * (F.relu(1 - real).mean(1) + F.relu(1 + fake).mean(1))


def fooling_loss(discriminator: PatchDiscriminator, pixels_BCHW: Tensor) -> Tensor:
    """How much each reconstruction looks like one to the discriminator (B,). Gradients reach the pictures only."""
    return -discriminator.judge_frozen(pixels_BCHW).flatten(1).mean(1)


def balance(reconstruction: Tensor, fooling: Tensor, last_weight: Tensor) -> Tensor:
    """The factor that makes the gradients of two scalar losses equally long at the decoder's last weights."""
    gradients = [
        torch.autograd.grad(each, last_weight, retain_graph=True)[0].norm() for each in (reconstruction, fooling)
    ]
    return (gradients[0] / (gradients[1] + 1e-4)).clamp(0, 1e4).detach()
