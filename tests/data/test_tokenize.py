"""Samples to codes: the same as the model's own, whatever is beside them; what is broken; clips and conversations."""

import json
import pickle
import shutil
from dataclasses import dataclass, replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from emu3.checkpoints import NANO
from emu3.checkpoints.load import load_model, load_processor
from emu3.checkpoints.quantize import quantize
from emu3.checkpoints.vision import load_vision_tokenizer
from emu3.data.samples import Broken, Media, Part, Sample
from emu3.data.tokenize import Tokenizer, tokenizer_hash
from emu3.modeling.vision import Emu3VQVAE
from emu3.segments import Text


@dataclass
class Listed:
    """A source of given samples, one piece."""

    items: list
    name: str = "listed"
    pieces: int = 1

    def read(self, piece):
        return iter(self.items)


def noise(seed, height, width):
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-height // 6), -(-width // 6), 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def png(picture):
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def drawing(key, picture, role="draw"):
    return Sample(key, (Part("prompt", Text(f"picture {key}")), Part(role, Media("picture", png(picture)))))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.of("nano")


@pytest.fixture(scope="module")
def encoder(tokenizer):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tokenizer.load()
    torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("size", [(48, 48), (100, 70), (30, 61), (20, 300)])
def test_reading_gives_the_codes_of_the_model(encoder, size):
    model, processor = load_model(NANO), load_processor(NANO)
    picture = noise(1, *size)
    (sample,), broken = encoder.tokenize(Listed([drawing("a", picture, "read")]), 0)
    inputs = processor.image_processor(picture, return_tensors="pt")
    ids = model.model.get_image_tokens(inputs["pixel_values"], inputs["image_sizes"])
    codes = sample.parts[1].content.codes_THW
    assert codes.dtype == np.int32 and not broken
    expected = model.model.vocabulary_mapping.convert_img2bpe(torch.from_numpy(codes[0])).flatten()
    assert torch.equal(ids, expected)
    if size == (48, 48):
        (drawn,), _ = encoder.tokenize(Listed([drawing("a", picture)]), 0)
        assert np.array_equal(drawn.parts[1].content.codes_THW, codes)


@torch.inference_mode()
def test_neighbours_do_not_matter(encoder):
    """Bit for bit, latents and codes: a batch always has the same number of pictures."""
    pictures = [np.asarray(noise(seed, 48, 48)) for seed in range(encoder.count((48, 48, 3)))]
    latents = []
    original = encoder.network.quantize.forward
    encoder.network.quantize.forward = lambda found: latents.append(found) or original(found)
    try:
        together = encoder.encode(pictures)
        reverse = encoder.encode(pictures[::-1])[::-1]
        alone = np.concatenate([encoder.encode([each]) for each in pictures])
    finally:
        del encoder.network.quantize.forward
    assert np.array_equal(together, reverse) and np.array_equal(together, alone)
    assert torch.equal(latents[0], latents[1].flip(0))
    assert torch.equal(latents[0], torch.cat([each[:1] for each in latents[2:]]))
    assert len(np.unique(together)) > 50


def test_many_sizes_keep_their_order(encoder):
    sizes = [(48, 48), (90, 60), (44, 52), (60, 90), (300, 100)]
    pictures = [noise(number, *sizes[number % 5]) for number in range(31)]
    samples, broken = encoder.tokenize(Listed([drawing(str(n), each) for n, each in enumerate(pictures)]), 0)
    assert [sample.key for sample in samples] == [str(number) for number in range(31)] and not broken
    for number in (0, 6, 13, 24, 30):
        (alone,), _ = encoder.tokenize(Listed([drawing("x", pictures[number])]), 0)
        assert samples[number].parts[0].content == Text(f"picture {number}")
        codes = samples[number].parts[1].content.codes_THW
        assert np.array_equal(codes, alone.parts[1].content.codes_THW)
        assert codes.shape == (1, *(side // 4 for side in encoder.tokenizer.sizes.for_drawing(*sizes[number % 5])))


def test_threads_change_nothing(encoder):
    items = [Broken("b", "of the source"), *(drawing(str(n), noise(n, 48, 60)) for n in range(40))]
    one = encoder.tokenize(Listed(items), 0)
    many = replace(encoder, threads=3).tokenize(Listed(items), 0)
    assert one[1] == many[1] == [Broken("b", "of the source")]
    for a, b in zip(one[0], many[0], strict=True):
        assert a.key == b.key and np.array_equal(a.parts[1].content.codes_THW, b.parts[1].content.codes_THW)


@pytest.mark.parametrize(
    "file, reason",
    [
        (png(Image.new("RGB", (1, 1))), "a picture of 1x1 pixels is smaller than one token of 4x4"),
        (png(Image.new("RGB", (801, 4))), "a picture of 4x801 pixels is more than 200 times longer than wide; crop it"),
        (b"", "the file is empty"),
        (b"no picture", "the file is no picture, or of a format that Pillow does not read"),
        (png(noise(0, 48, 48))[:-200], "cannot read the picture: image file is truncated"),
    ],
)
def test_a_broken_picture_is_not_the_end(encoder, file, reason):
    broken = Sample(
        "bad", (Part("read", Media("picture", png(noise(3, 48, 48)))), Part("draw", Media("picture", file)))
    )
    samples, found = encoder.tokenize(Listed([drawing("a", noise(1, 48, 48)), broken, drawing("b", noise(2, 9, 9))]), 0)
    assert [sample.key for sample in samples] == ["a", "b"]
    assert found[0].key == "bad" and found[0].reason.startswith(reason)


def test_a_conversation_keeps_its_texts(encoder):
    parts = (
        Part("system", Text("Be brief.")),
        Part("read", Media("picture", png(noise(1, 80, 40)))),
        Part("prompt", Text("What is it?")),
        Part("answer", Text("a cat"), train=False),
        Part("draw", Media("picture", png(noise(2, 80, 40))), train=False),
    )
    (sample,), _ = encoder.tokenize(Listed([Sample("c", parts)]), 0)
    assert [(each.role, each.train) for each in sample.parts] == [(each.role, each.train) for each in parts]
    assert [sample.parts[index] for index in (0, 2, 3)] == [parts[index] for index in (0, 2, 3)]
    assert [each.content.shape[:2] for each in (sample.parts[1], sample.parts[4])] == [(16, 8), (17, 8)]


@torch.inference_mode()
def test_clips_keep_their_time(encoder):
    frames = [noise(seed, 48, 48) for seed in range(10)]
    file = BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=125, lossless=True)
    short = BytesIO()
    frames[0].save(short, "WEBP", save_all=True, append_images=frames[1:3], duration=125, lossless=True)
    clips = [Sample(key, (Part("draw", Media("clip", each.getvalue())),)) for key, each in (("a", file), ("b", short))]
    (sample,), broken = encoder.tokenize(Listed(clips), 0)
    visual = sample.parts[0].content
    pixels = np.stack([np.asarray(frame) for frame in frames[:8]]).astype(np.float32) / 127.5 - 1
    expected = encoder.network.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2)[None], [[48, 48]]).image_tokens[0]
    assert visual.frames_per_second == 8 and np.array_equal(visual.codes_THW, expected.numpy())
    assert broken == [Broken("b", "a clip of 3 frames is too short; it needs 4, which share a code")]


@torch.inference_mode()
def test_groups_on_their_own(encoder, tokenizer, tmp_path):
    """Where they are asked for, or where the checkpoint says so; the codes are those of each group alone."""
    folder = shutil.copytree(NANO, tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    config["clips"]["independent_groups"] = True
    (folder / "config.json").write_text(json.dumps(config))
    assert not tokenizer.independent_groups
    own = Tokenizer.of(folder)
    assert own.settings == Tokenizer.of("nano", independent_groups=True).settings != tokenizer.settings
    assert Tokenizer.of(folder, independent_groups=False).settings == tokenizer.settings
    clip = np.stack([np.asarray(noise(seed, 48, 48)) for seed in range(8)])
    alone = np.concatenate([encoder.encode([group]) for group in np.split(clip, 2)], 1)
    assert np.array_equal(replace(encoder, tokenizer=own).encode([clip]), alone)
    assert not np.array_equal(encoder.encode([clip]), alone)


def test_only_the_vision_tokenizer_is_loaded(tokenizer, tmp_path):
    """From a folder of its own, or from a quantized checkpoint, it is the same one."""
    network = load_vision_tokenizer(NANO)
    assert tokenizer.hash == tokenizer_hash(network) == tokenizer_hash(load_model(NANO).model.vqmodel)
    network.save_pretrained(tmp_path / "own")
    own = Tokenizer.of(tmp_path / "own", area=2304)
    assert own.hash == tokenizer.hash and own.sizes.draw == tokenizer.sizes.draw
    assert np.array_equal(own.pictures.levels_VC, tokenizer.pictures.levels_VC)
    assert (own.sizes.min_pixels, own.sizes.max_pixels) == (2304, 2304) and own.settings != tokenizer.settings
    with pytest.raises(ValueError, match="does not say how large its pictures are; give --area"):
        Tokenizer.of(tmp_path / "own")
    quantize(NANO, tmp_path / "quantized", 8, None)
    quantized = Tokenizer.of(tmp_path / "quantized")
    assert (quantized.hash, quantized.settings) == (tokenizer.hash, tokenizer.settings)
    assert Tokenizer.of("nano", area=1600).settings != tokenizer.settings
    network.quantize.embedding.weight.data[3] += 1
    assert tokenizer_hash(network) != tokenizer.hash


def test_a_tokenizer_goes_to_other_processes(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.settings, copy.hash) == (tokenizer.settings, tokenizer.hash)
    with pytest.raises(ValueError, match="another vision tokenizer here"):
        replace(copy, hash="0" * 16).load()


def test_a_damaged_tokenizer_is_refused(tmp_path):
    Emu3VQVAE(load_vision_tokenizer(NANO).config).save_pretrained(tmp_path / "own")
    for name, change, message in (
        ("blocks", ('"num_res_blocks": 1', '"num_res_blocks": 2000000000'), "tensors are those of 1"),
        ("codes", ('"codebook_size": 864', '"codebook_size": 865'), "quantize.embedding.weight"),
        ("width", ('"base_channels": 32', '"base_channels": 33'), "multiples of 32"),
        ("kind", ('"codebook_size": 864', '"codebook_size": "864"'), "must be a whole number"),
    ):
        folder = shutil.copytree(tmp_path / "own", tmp_path / name)
        config = (folder / "config.json").read_text()
        assert change[0] in config
        (folder / "config.json").write_text(config.replace(*change))
        with pytest.raises(ValueError, match=message):
            load_vision_tokenizer(folder)
