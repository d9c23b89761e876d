"""Crops of people's pictures and clips."""

import pickle
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image

from emu3.data.samples import Broken, Media, Part, Sample
from emu3.data.sources import open_source
from emu3.training import crops as module
from emu3.training.crops import Crops, CropSettings, cut, find_media, shrink, split


def make_picture(height, width):
    """Red tells the row, green the column, blue is 255."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, 255)], -1).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        Image.fromarray(make_picture(40, 50) + np.uint8(number)).save(tmp_path / f"picture-{number}.png")
    frames = [Image.fromarray(np.full((32, 40, 3), 20 * number, np.uint8)) for number in range(10)]
    frames[0].save(tmp_path / "clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    return tmp_path


class Archive:
    """A source whose files are bytes, in two pieces."""

    name, pieces = "archive", 2

    def __init__(self, folder):
        self.files = [path.read_bytes() for path in sorted(folder.glob("*.png"))]

    def read(self, piece):
        yield Broken(f"broken-{piece}", "is broken")
        for number in (0, 1):
            key = f"{piece}-{number}"
            yield Sample(key, (Part("draw", Media("picture", self.files[2 * piece + number])),))


def test_batches_are_pure_functions_of_their_numbers(folder):
    source = open_source(folder)
    crops = Crops(source, find_media(source), CropSettings(size=16, frames=4), seed=3)
    batches = [crops.batch(0.5, 8, step, part) for step in range(4) for part in range(2)]
    assert {tuple(batch.pixels.shape) for batch in batches} == {(8, 3, 16, 16), (2, 4, 3, 16, 16)}
    assert [batch.step for batch in batches] == [0, 0, 1, 1, 2, 2, 3, 3]
    again = pickle.loads(pickle.dumps(crops))
    assert len(pickle.dumps(crops)) < 5000  # without pixels
    for number in (5, 2):
        assert torch.equal(again.batch(0.5, 8, *divmod(number, 2)).pixels, batches[number].pixels)
    first = torch.stack([crops.pictures(1, step, part)[0] for step in range(4) for part in range(2)])
    assert len(first.flatten(1).unique(dim=0)) == 8
    other = Crops(source, find_media(source), CropSettings(size=16), seed=4)
    assert not torch.equal(other.pictures(8, 0), crops.pictures(8, 0))


def test_archives_are_read_piece_by_piece(folder, monkeypatch):
    monkeypatch.setattr(module, "PIECES_AT_ONCE", 1)
    monkeypatch.setattr(module, "STEPS_OF_PIECES", 2)
    source = Archive(folder)
    found = find_media(source)
    assert [(each.key, each.piece, each.number, each.file) for each in found] == [
        (f"{piece}-{number}", piece, number, None) for piece in range(2) for number in range(2)
    ]
    crops = Crops(source, found, CropSettings(size=40, zoom=1.0, flip=False), seed=0)
    blue = [crops.pictures(8, step)[:, 2, 0, 0].add(1).mul(127.5).round().unique().tolist() for step in range(8)]
    # Blue is 255 + number: a step sees the pictures of one piece, two steps see the same piece.
    pieces = [{255: 0, 0: 0, 1: 1, 2: 1}[int(values[0])] for values in blue]
    assert pieces[::2] == pieces[1::2]
    assert set(pieces) == {0, 1}
    assert {value for values in blue for value in values} == {255, 0, 1, 2}


def test_what_is_held_out_depends_on_the_key_alone():
    found = [module.Found(f"{kind}-{n}", kind, 0, n, "x") for kind in ("picture", "clip") for n in range(400)]
    training, held_out = split(found, 0.05)
    assert sorted(each.key for each in training + held_out) == sorted(each.key for each in found)
    assert 20 < len(held_out) < 60
    some = [each for each in found if each.number % 2]
    assert split(some, 0.05)[1] == [each for each in held_out if each.number % 2]
    assert split(found, 0.0) == (found, [])
    assert [each.kind for each in split(found[:2] + found[-2:], 1e-9)[1]] == ["picture", "clip"]  # one of two
    assert split(found[:1], 1e-9) == (found[:1], [])  # but never the only one


def test_a_window_is_cut_and_not_scaled_where_it_is_a_crop():
    settings = CropSettings(size=16, flip=False)
    pixels = cut(make_picture(16, 30)[None], 1, settings, np.random.default_rng(0))
    whole = torch.from_numpy(make_picture(16, 30)).movedim(-1, 0) / 127.5 - 1
    left = round(float(pixels[0, 1, 0, 0] + 1) * 127.5)
    torch.testing.assert_close(pixels[0], whole[:, :, left : left + 16])
    square, greens = make_picture(16, 16)[None], set()
    for seed in range(9):
        pixels = cut(square, 1, CropSettings(size=16), np.random.default_rng(seed))
        greens.add(round(float(pixels[0, 1, 0, 0] + 1) * 127.5))
    assert greens == {0, 15}  # as it is, or mirrored


def test_windows_are_between_a_crop_and_the_shorter_side():
    rng = np.random.default_rng(0)
    heights = []
    for _ in range(200):
        rows = (cut(make_picture(128, 200)[None], 1, CropSettings(size=16), rng)[0, 0, :, 0] + 1) * 127.5
        heights.append(float(rows.amax() - rows.amin()) * 16 / 15)
    assert 14 < min(heights) < 20
    assert 110 < max(heights) <= 130
    assert 35 < np.median(heights) < 60  # the logarithm is uniform: sqrt(16 * 128) = 45


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((400, 800), (64, 128)), ((100, 50), (100, 50)), ((8, 12), (16, 24))],
    ids=["large", "as it is", "smaller than a crop"],
)
def test_pictures_are_kept_at_the_size_that_crops_need(size, wanted):
    picture = Image.fromarray(np.zeros((*size, 3), np.uint8))
    assert np.asarray(shrink(picture, CropSettings(size=16, zoom=4.0))).shape == (*wanted, 3)


@pytest.mark.parametrize(
    ("length", "stride", "steps"), [(20, 2, [2, 2, 2]), (6, 2, [1, 1, 1]), (2, 1, [1, 0, 0]), (1, 1, [0, 0, 0])]
)
def test_frames_of_a_clip(length, stride, steps):
    frames = np.arange(length, dtype=np.uint8)[:, None, None, None].repeat(16, 1).repeat(16, 2).repeat(3, 3)
    pixels = cut(frames, 4, CropSettings(size=16, stride=stride), np.random.default_rng(0))
    numbers = (pixels[:, 0, 0, 0] + 1) * 127.5
    assert numbers.diff().round().tolist() == steps


def test_frames_of_clips_where_there_are_no_pictures(folder):
    source = open_source(folder)
    clips = [each for each in find_media(source) if each.kind == "clip"]
    crops = Crops(source, clips, CropSettings(size=16), seed=0)
    assert not crops.has("picture")
    grey = ((crops.pictures(40, 0)[:, 0, 0, 0] + 1) * 127.5).round()
    assert set(grey.tolist()) == {20.0 * number for number in range(10)}


def test_broken_files_are_left_out(folder, caplog):
    (folder / "picture-0.png").write_bytes(b"no picture")
    source = open_source(folder)
    crops = Crops(source, find_media(source), CropSettings(size=16), seed=0)
    assert crops.pictures(64, 0).shape == (64, 3, 16, 16)
    assert [record.getMessage()[:24] for record in caplog.records] == ["picture-0 is left out: t"]
    for path in folder.glob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"50 files of .* in a row cannot be opened; `emu3 data` says why"):
        Crops(source, find_media(source), CropSettings(size=16), seed=0).pictures(1, 0)


def test_decoded_pictures_are_kept_up_to_a_limit(folder):
    source = open_source(folder)
    crops = Crops(source, find_media(source), CropSettings(size=16, zoom=2.0, cache_megabytes=0), seed=0)
    crops.pictures(16, 0)
    assert len(crops._decoded) == 1
    kept = Crops(source, find_media(source), CropSettings(size=16, zoom=2.0), seed=0)
    kept.pictures(64, 0)
    assert len(kept._decoded) == 4
    assert kept._bytes == 4 * 32 * 40 * 3


def test_a_source_without_pictures():
    class Empty:
        name, pieces = "words", 1

        def read(self, piece):
            yield Broken("a", "is broken")

    with pytest.raises(ValueError, match="'words' has no pictures or clips to train on; `emu3 data` says"):
        find_media(Empty())


def test_recoloured_crops_are_the_same_but_for_the_order_of_channels():
    frames = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 3), np.uint8)
    plain, changed = (
        [cut(frames, 2, CropSettings(size=16, recolor=share), np.random.default_rng(seed)) for seed in range(40)]
        for share in (0.0, 0.5)
    )
    orders = list(permutations(range(3)))
    found = [
        [order for order in orders if torch.equal(a[:, list(order)], b)] for a, b in zip(plain, changed, strict=True)
    ]
    assert all(len(each) == 1 for each in found)
    assert {each[0] for each in found} == set(orders)
    assert 0.5 < sum(each[0] == (0, 1, 2) for each in found) / len(found) < 0.8
