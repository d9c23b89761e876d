"""Figures and losses of reconstructions."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from emu3.training.reconstruction import edge_loss, psnr, ssim, structure_loss


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    target = torch.nn.functional.avg_pool2d(torch.rand(3, 3, 44, 40, generator=generator) * 2 - 1, 3, 1)
    return (target + 0.2 * torch.randn(target.shape, generator=generator)).clamp(-1, 1), target


def test_psnr():
    target = torch.zeros(2, 3, 4, 4)
    target[1] = 0.5
    # 2 is the peak: 20 log10(2 / 0.2); pixels are clipped to 1.
    torch.testing.assert_close(psnr(target + 0.2, target), torch.tensor([20.0, 20.0]))
    torch.testing.assert_close(psnr(target + 5.0, target), torch.tensor([20 * np.log10(2), 20 * np.log10(4)]).float())


def test_figures_equal_those_of_scikit_image(pair):
    pixels, target = pair
    for number, (a, b) in enumerate(zip(pixels.numpy(), target.numpy(), strict=True)):
        wanted = structural_similarity(
            a, b, channel_axis=0, data_range=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert float(ssim(pixels, target)[number]) == pytest.approx(wanted, abs=1e-5)
        assert float(psnr(pixels, target)[number]) == pytest.approx(peak_signal_noise_ratio(b, a, data_range=2))


def test_similarity_of_equal_pictures_and_of_small_ones(pair):
    torch.testing.assert_close(ssim(pair[1], pair[1]), torch.ones(3))
    with pytest.raises(ValueError, match="at least 11x11 pixels, not 10x38"):
        ssim(pair[0][:, :, :10], pair[1][:, :, :10])


def test_structure_loss_is_a_mean_over_scales(pair):
    halves = [torch.nn.functional.avg_pool2d(each, 2) for each in pair]
    torch.testing.assert_close(structure_loss(*pair), 1 - (ssim(*pair) + ssim(*halves)) / 2)  # a quarter is too small
    assert structure_loss(pair[0][:, :, :8], pair[1][:, :, :8]).tolist() == [0.0, 0.0, 0.0]


def test_edge_loss_sees_edges_and_not_brightness():
    target = torch.zeros(1, 1, 4, 4)
    assert edge_loss(target + 0.3, target).tolist() == [0.0]
    step = target.clone()
    step[..., 2:] = 1.0
    # At full size 1 of 3 columns of differences is 1; at half size the only one is; then there is one pixel.
    assert edge_loss(step, target).tolist() == pytest.approx([(1 / 3 + 1) / 2])
