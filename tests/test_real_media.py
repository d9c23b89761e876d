"""A photograph and a clip of installed packages, at the documented sizes: pixels, codes and tokens as Emu3 counts them.

The vision tokenizer has the documented factors and codebook, and fewer channels.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emu3.clips import read_clip
from emu3.configuration import Emu3VQVAEConfig
from emu3.image_processing import Emu3ImageProcessor
from emu3.layout import Emu3Layout
from emu3.modeling.vision import Emu3VQVAE
from emu3.segments import Shape, Text, Visual
from emu3.tokenization import PlainText, train_tokenizer, vocabulary_map
from emu3.video_processing import Emu3VideoProcessor
from emu3.vocabulary import Vocabulary

DATA = Path(pytest.importorskip("skimage").__file__).parent / "data"
CODES = 32_768


@pytest.fixture(scope="module")
def layout():
    tokenizer = train_tokenizer(["fps s"], 258, CODES)
    return Emu3Layout(Vocabulary.from_map(vocabulary_map(tokenizer)), PlainText(tokenizer))


@pytest.fixture(scope="module")
def vqmodel():
    small = {
        "base_channels": 32,
        "hidden_size": 32,
        "channel_multiplier": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [],
    }
    torch.manual_seed(0)
    return Emu3VQVAE(Emu3VQVAEConfig(**small)).eval()


@pytest.mark.parametrize(
    ("name", "pixels", "tokens"),
    [
        ("astronaut.png", (512, 512), (64, 64)),
        ("coffee.png", (424, 632), (53, 79)),  # 400x600 is below 512*512 pixels, and becomes as many or more
        ("hubble_deep_field.jpg", (872, 1000), (109, 125)),
    ],
)
def test_a_photograph(name, pixels, tokens, layout, vqmodel):
    inputs = Emu3ImageProcessor()(Image.open(DATA / name).convert("RGB"), return_tensors="pt")
    assert tuple(inputs["pixel_values"].shape[2:]) == tuple(inputs["image_sizes"][0].tolist()) == pixels
    (codes_HW,) = vqmodel.encode(inputs["pixel_values"], inputs["image_sizes"]).image_tokens
    assert tuple(codes_HW.shape) == tokens
    height, width = tokens
    ids = layout.spell([Visual(codes_HW.numpy()[None])])
    digits = len(f"{height}*{width}")  # a token each
    assert len(ids) == 1 + digits + 1 + height * (width + 1) + 1 + 1  # boi, size, img, rows with eol, eof, eoi
    assert ids.count(layout.vocabulary.eol) == height and ids.count(layout.vocabulary.eof) == 1
    (again,) = layout.read(ids)
    assert np.array_equal(again.codes_THW[0], codes_HW.numpy())


def test_a_clip(layout, vqmodel):
    clip = read_clip(DATA / "no_time_for_that_tiny.gif")
    processor = Emu3VideoProcessor(max_frames=12)
    inputs = processor(clip, return_tensors="pt")
    frames, height, width = *inputs["pixel_values_videos"].shape[1:2], *inputs["pixel_values_videos"].shape[3:]
    assert frames == 12 and height % 8 == width % 8 == 0 and 512 * 512 <= height * width <= 1024 * 1024
    source = clip.frames_THWC.shape[1:3]
    assert height / width == pytest.approx(source[0] / source[1], rel=0.02)
    pieces = inputs["pixel_values_videos"].split(4, 1)
    codes_THW = torch.cat(list(vqmodel.encode_stream(pieces)), 1)[0].numpy()
    assert codes_THW.shape == (3, height // 8, width // 8)
    shape = Shape(height // 8, width // 8, 3, clip.frames_per_second)
    words = layout.words.encode(layout.clips.write(shape))
    ids = layout.spell([Visual(codes_THW, clip.frames_per_second)])
    assert len(ids) == 1 + len(words) + 1 + 3 * (shape.height * (shape.width + 1) + 1) + 1
    (again,) = layout.read(ids)
    assert np.array_equal(again.codes_THW, codes_THW)


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        (Shape(90, 90), 90 * 91 + 3),  # 720x720, the picture of the released checkpoint: 8,193 to write
        (Shape(64, 64, 30, 24.0), 30 * (64 * 65 + 1) + 2),  # 5 seconds of 512x512 at 24 frames a second
    ],
)
def test_what_is_to_be_written(shape, tokens, layout):
    assert layout.grammar(shape).length == tokens
    assert len(layout.grammar(shape).ids_of(np.zeros((shape.frames, shape.height, shape.width), np.int64))) == tokens
    assert 30 * (64 * 65 + 1) == 124_830 < 131_072


def test_a_prompt_with_a_photograph(layout, vqmodel):
    """Words, then a picture: what stands before the answer to an edit."""
    codes = Visual(np.zeros((1, 64, 64), np.int64))
    prompt = layout.prompt("make it blue", Shape(64, 64), (codes,))
    words = len(layout.spell([Text("make it blue")]))
    picture = 1 + 5 + 1 + 64 * 65 + 1 + 1
    assert len(prompt) == 1 + picture + words + 1 + 5 + 1  # bos; boi, size and img of what is to be drawn
