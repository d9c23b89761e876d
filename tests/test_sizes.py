import io

import numpy as np
from PIL import Image

from emu3.segments import Shape
from emu3.sizes import tokens_to_draw, upright_size


def test_the_mask_of_a_turned_picture_has_its_upright_size() -> None:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 8)).save(file, "JPEG", exif=exif)
    size = upright_size(Image.open(file))
    assert size == (16, 8)
    mask = np.zeros(size, bool)
    mask[9, 7] = True
    drawn_HW = tokens_to_draw(Shape(4, 2), 4, size, mask, below=4)
    assert np.argwhere(drawn_HW).tolist() == [[2, 1], [4, 0], [4, 1]]
