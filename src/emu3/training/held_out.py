"""Pictures and clips that a tokenizer was not trained on: figures, and sheets of originals above reconstructions.

Letters: B, C, T, H, W, see CONTRIBUTING.md.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from emu3.training.codebook import CodeUse
from emu3.training.reconstruction import WINDOW, psnr, ssim
from emu3.training.vision import VisionObjective

COLUMNS = 8
SIDE = 128  # pixels of a sheet's cell, at least
_AT_ONCE = 16  # frames, to save memory


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Pictures (B, C, H, W) and clips (B, T, C, H, W) in [-1, 1], in the same crops at every look; None: none."""

    pictures: Tensor | None
    clips: Tensor | None = None

    def measure(self, objective: VisionObjective) -> dict[str, float]:
        """PSNR in dB and SSIM, means over pictures and frames, and the codes that occur.

            psnr, ssim               pictures
            clip_psnr, clip_ssim     clips, through the temporal layers
            codes_used, codes_share, codes_perplexity

        The tokenizer is in evaluation mode meanwhile.
        """
        figures: dict[str, float] = {}
        uses = torch.zeros(len(objective.codebook), device=objective.codebook.device)
        for name, originals in (("", self.pictures), ("clip_", self.clips)):
            if originals is None:
                continue
            made, codes = reconstruct(objective, originals)
            figures |= {name + key: value for key, value in compare(made, originals).items()}
            if codes is not None:
                uses += torch.bincount(codes.flatten(), minlength=len(uses))
        if uses.any():
            figures |= {f"codes_{key}": float(value) for key, value in CodeUse.of(uses)._asdict().items()}
        return figures

    def compare_clips(self, objective: VisionObjective) -> dict[str, dict[str, float]]:
        """Clips three ways, each with its `tokens` for a clip, `psnr` and `ssim`.

        through time   through the temporal layers
        by frame       every frame as a picture of its own: more tokens, by the temporal factor
        same tokens    every frame as a picture, at a smaller size, so that the tokens are about as many as through time
        """
        assert self.clips is not None
        factor = objective.tokenizer.config.temporal_downsample_factor
        frames, size = self.clips.flatten(0, 1), self.clips.shape[-1]
        space = objective.tokenizer.spatial_scale_factor
        smaller = max(space, round(size / factor**0.5 / space) * space)
        small = F.interpolate(frames, (smaller, smaller), mode="bicubic", antialias=True).clamp(-1, 1)
        made = {"through time": self.clips, "by frame": frames, "same tokens": small}
        table = {}
        for name, pixels in made.items():
            output, codes = reconstruct(objective, pixels)
            output = output.reshape(-1, *output.shape[-3:])
            if name == "same tokens":
                output = F.interpolate(output, (size, size), mode="bicubic")
            tokens = 0 if codes is None else codes.numel() // len(self.clips)
            table[name] = {"tokens": float(tokens)} | compare(output, frames)
        return table

    def sheet(self, objective: VisionObjective) -> Image.Image:
        """Originals above reconstructions: first pictures, then the frames of two clips."""
        rows: list[Tensor] = []
        if self.pictures is not None:
            shown = self.pictures[: 2 * COLUMNS]
            for originals, made in zip(
                shown.split(COLUMNS), reconstruct(objective, shown)[0].split(COLUMNS), strict=True
            ):
                rows += [originals, made]
        if self.clips is not None:
            shown = self.clips[:2, :COLUMNS]
            for originals, made in zip(self.clips[:2], reconstruct(objective, self.clips[:2])[0], strict=True):
                rows += [originals[:COLUMNS], made[:COLUMNS]]
        return stack_rows(rows)

    def write_sheet(self, objective: VisionObjective, folder: Path, step: int) -> Path:
        """The sheet as FOLDER/sheets/step-000500.png."""
        path = folder / "sheets" / f"step-{step:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.sheet(objective).save(path)
        return path


@torch.no_grad()
def reconstruct(objective: VisionObjective, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Reconstructions of pictures or clips, clipped to [-1, 1], on the CPU; and their codes, if there is a codebook."""
    training, device = objective.training, objective.codebook.device
    objective.eval()
    made, codes = [], []
    for part in pixels.split(max(1, _AT_ONCE // (pixels.shape[1] if pixels.ndim == 5 else 1))):
        part = part.to(device)
        made.append(objective.reconstruct(part)[0].clamp(-1, 1).cpu())
        if objective.quantizes:
            codes.append(objective.codes(part))
    objective.train(training)
    return torch.cat(made), torch.cat(codes) if codes else None


def compare(made: Tensor, originals: Tensor) -> dict[str, float]:
    """PSNR and SSIM, means over pictures and frames. Pictures too small for SSIM's window have none."""
    made_BCHW, originals_BCHW = (each.reshape(-1, *each.shape[-3:]) for each in (made, originals))
    figures = {"psnr": float(psnr(made_BCHW, originals_BCHW).mean())}
    if min(made.shape[-2:]) >= WINDOW:
        figures["ssim"] = float(ssim(made_BCHW, originals_BCHW).mean())
    return figures


def stack_rows(rows: list[Tensor]) -> Image.Image:
    """Rows of pictures (B, C, H, W) in [-1, 1], one under the other; small ones are enlarged by whole numbers."""
    height, width = rows[0].shape[-2:]
    scale, gap = max(1, SIDE // max(height, width)), 4
    columns = max(len(row) for row in rows)
    sheet = np.full((len(rows) * (height * scale + gap), columns * (width * scale + gap), 3), 255, np.uint8)
    for number, row in enumerate(rows):
        for place, pixels in enumerate(row):
            cell = to_bytes(pixels).repeat(scale, 0).repeat(scale, 1)
            # A pair's gap is below it, so that each reconstruction touches its original.
            top, left = number * (height * scale + gap) + (gap if number % 2 == 0 else 0), place * (width * scale + gap)
            sheet[top : top + height * scale, left : left + width * scale] = cell
    return Image.fromarray(sheet)


def to_bytes(pixels_CHW: Tensor) -> NDArray[np.uint8]:
    """A picture in [-1, 1] as bytes (H, W, C)."""
    return ((pixels_CHW.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(0, -1).cpu().numpy()
