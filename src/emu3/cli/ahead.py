"""What a checkpoint's settings tell of a request, before torch is imported and the weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from emu3.checkpoints import resolve
from emu3.checkpoints.opened import processor_folder, read_learned, read_settings
from emu3.checkpoints.settings import read_picture_settings
from emu3.learned import Learned
from emu3.options import Draw, Load, check_whole
from emu3.segments import Shape
from emu3.sizes import check_drawn, frames_of_codes, smart_resize, tokens_of, tokens_to_draw, upright_size

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Settings:
    """The settings of a checkpoint.

    Attributes:
        config: config.json.
        pictures: the image processor's.
        learned: what it says that it has learned.
    """

    config: Mapping[str, Any]
    pictures: Mapping[str, Any]
    learned: Learned

    @classmethod
    def of(cls, model: str, load: Load) -> Settings:
        """Those of a checkpoint by its name. ValueError where there is none, or they cannot be used."""
        folder = resolve(model, download=load.download)
        pictures, _ = read_picture_settings(processor_folder(folder))
        return cls(read_settings(folder), pictures, read_learned(folder))

    @property
    def factor(self) -> int:
        """Pixels of a visual token's side."""
        return int(self.pictures.get("spatial_factor", 8))

    def check_size(self, draw: Draw) -> None:
        """ValueError for a height or width that is not of whole tokens, or for a picture that is too long."""
        if draw.height is not None and draw.width is not None:
            tokens_of("height", draw.height, self.factor)
            tokens_of("width", draw.width, self.factor)
            check_drawn(draw.height, draw.width)

    def check_frames(self, frames: int | None) -> None:
        """ValueError for a length that no clip of the checkpoint can have."""
        if frames is not None:
            temporal_factor = (self.config.get("vq_config") or {}).get("temporal_downsample_factor", 4)
            frames_of_codes(check_whole("frames", frames), temporal_factor)

    def size_read(self, picture: Image.Image) -> tuple[int, int]:
        """Height and width in pixels at which the checkpoint reads a picture. ValueError for one that is too long."""
        height, width = upright_size(picture)
        if not self.pictures.get("do_resize", True):
            return height, width
        limits = {name: self.pictures[name] for name in ("min_pixels", "max_pixels") if name in self.pictures}
        return smart_resize(height, width, self.factor, **limits)

    def resized(self, name: str, picture: Image.Image) -> dict[str, Any] | None:
        """From which size to which a picture is resized, both (width, height) in pixels; None where it is not."""
        (height, width), (new_height, new_width) = upright_size(picture), self.size_read(picture)
        if (height, width) == (new_height, new_width):
            return None
        return {"picture": name, "from": (width, height), "to": (new_width, new_height)}

    def check_part(self, picture: Image.Image, mask: Image.Image | None, below: int) -> None:
        """ValueError for a mask of another size than the picture, or where nothing of the picture is to be drawn."""
        height, width = self.size_read(picture)
        shape = Shape(height // self.factor, width // self.factor)
        tokens_to_draw(shape, self.factor, upright_size(picture), mask, below)
