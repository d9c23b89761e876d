"""The patch discriminator: whose gradients go where."""

import pytest
import torch
from torch import nn

from emu3.training.discriminator import PatchDiscriminator, balance, discriminator_loss, fooling_loss


@pytest.fixture
def parts():
    torch.manual_seed(0)
    discriminator, maker = PatchDiscriminator(3, 8), nn.Conv2d(3, 3, 1)
    target = torch.rand(2, 3, 32, 32)
    return discriminator, maker, maker(target), target


def has_gradients(module):
    return any(each.grad is not None and bool(each.grad.any()) for each in module.parameters())


def test_each_side_trains_by_its_own_loss_alone(parts):
    discriminator, maker, pixels, target = parts
    discriminator_loss(discriminator, pixels, target).sum().backward()
    assert (has_gradients(discriminator), has_gradients(maker)) == (True, False)
    discriminator.zero_grad()
    fooling_loss(discriminator, pixels).sum().backward()
    assert (has_gradients(discriminator), has_gradients(maker)) == (False, True)


def test_hinge(parts):
    discriminator, _, pixels, target = parts
    real, fake = discriminator(target).flatten(1), discriminator(pixels).flatten(1)
    wanted = 0.5 * ((1 - real).clamp_min(0).mean(1) + (1 + fake).clamp_min(0).mean(1))
    torch.testing.assert_close(discriminator_loss(discriminator, pixels, target), wanted)
    torch.testing.assert_close(fooling_loss(discriminator, pixels), -fake.mean(1))


def test_a_judgement_does_not_depend_on_the_batch(parts):
    discriminator, _, _, target = parts
    torch.testing.assert_close(discriminator(target)[:1], discriminator(target[:1]))


def test_balance_makes_gradients_equally_long(parts):
    _, maker, pixels, target = parts
    rebuilt, fooling = (pixels - target).square().mean(), 7 * pixels.mean()
    factor = balance(rebuilt, fooling, maker.weight)
    lengths = [
        torch.autograd.grad(each, maker.weight, retain_graph=True)[0].norm() for each in (rebuilt, factor * fooling)
    ]
    torch.testing.assert_close(lengths[0], lengths[1], rtol=1e-3, atol=0)


def test_channels_that_make_no_groups_are_refused():
    with pytest.raises(ValueError, match="discriminator_channels is 12; give a multiple of 8"):
        PatchDiscriminator(3, 12)
