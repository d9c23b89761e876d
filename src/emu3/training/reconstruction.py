"""How far a reconstruction is from its original: figures to report, and losses to train by.

Pictures are (B, C, H, W) in [-1, 1]. Every function returns one number a picture, (B,). None of them needs the weights
of another network.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PEAK = 2.0
"""The distance between black and white."""

WINDOW = 11  # pixels of SSIM's window
_DEVIATION = 1.5  # of the Gaussian in it
_LUMINANCE, _CONTRAST = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


def psnr(pixels_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, after pixels are clipped to the range."""
    error_B = (pixels_BCHW.clamp(-1, 1) - target_BCHW).square().flatten(1).mean(1).clamp_min(1e-10)
    return 10 * torch.log10(PEAK**2 / error_B)


def ssim(pixels_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004), 1 for equal pictures: the mean over channels and places.

    The window is a Gaussian of 11 pixels, as in the paper. ValueError for pictures smaller than it.
    """
    channels, height, width = pixels_BCHW.shape[1:]
    if min(height, width) < WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {WINDOW}x{WINDOW} pixels, not {height}x{width}")
    places = torch.arange(WINDOW, device=pixels_BCHW.device, dtype=pixels_BCHW.dtype) - WINDOW // 2
    line = torch.exp(-0.5 * (places / _DEVIATION) ** 2)
    line = (line / line.sum()).expand(channels, 1, 1, -1)

    def blur(x_BCHW: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x_BCHW, line, groups=channels), line.transpose(2, 3), groups=channels)

    mean, target_mean = blur(pixels_BCHW), blur(target_BCHW)
    variance = blur(pixels_BCHW.square()) - mean.square()
    target_variance = blur(target_BCHW.square()) - target_mean.square()
    covariance = blur(pixels_BCHW * target_BCHW) - mean * target_mean
    luminance = (2 * mean * target_mean + _LUMINANCE) / (mean.square() + target_mean.square() + _LUMINANCE)
    structure = (2 * covariance + _CONTRAST) / (variance + target_variance + _CONTRAST)
    return (luminance * structure).flatten(1).mean(1)


def structure_loss(pixels_BCHW: Tensor, target_BCHW: Tensor, scales: int = 3) -> Tensor:
    """1 - SSIM, the mean over the picture and its halves, as long as they hold a window."""
    losses = []
    for scale in range(scales):
        if min(pixels_BCHW.shape[-2:]) < WINDOW:
            break
        losses.append(1 - ssim(pixels_BCHW, target_BCHW))
        if scale + 1 < scales:
            pixels_BCHW, target_BCHW = F.avg_pool2d(pixels_BCHW, 2), F.avg_pool2d(target_BCHW, 2)
    return torch.stack(losses).mean(0) if losses else pixels_BCHW.new_zeros(len(pixels_BCHW))


def edge_loss(pixels_BCHW: Tensor, target_BCHW: Tensor, scales: int = 4) -> Tensor:
    """Mean absolute error of the differences between neighbours, of the picture, its half, its quarter and so on."""
    error_BCHW, losses = pixels_BCHW - target_BCHW, []
    for scale in range(scales):
        if min(error_BCHW.shape[-2:]) < 2:
            break
        losses.append(sum(error_BCHW.diff(dim=axis).abs().flatten(1).mean(1) for axis in (2, 3)))
        if scale + 1 < scales:
            error_BCHW = F.avg_pool2d(error_BCHW, 2)
    return torch.stack([torch.as_tensor(each) for each in losses]).mean(0)
