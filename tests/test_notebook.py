"""What a notebook shows: lists of pictures, results, streams as they come; and the example runs as it is."""

import base64
import io
from itertools import count, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from emu3 import Emu3Pipeline
from emu3.results import Pictures
from emu3.sheet import MARGIN, SIDE

IPython = pytest.importorskip("IPython")

EXAMPLE = Path(__file__).parents[1] / "examples" / "nano.ipynb"


@pytest.fixture(scope="module")
def nano():
    return Emu3Pipeline.from_pretrained("nano")


@pytest.fixture
def displayed(monkeypatch):
    """What a cell shows, every update of it."""
    shown = []

    class Display:
        def update(self, value):
            shown.append(value)

    def display(value, display_id):
        assert display_id is True
        shown.append(value)
        return Display()

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr("emu3.results._SHOWING_CREDIT", 1e6)  # as often as something comes
    return shown


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def test_a_list_shows_its_pictures(nano):
    pictures = nano.image(["a photo of a red car", "a photo of a dog"], seed=1)
    assert isinstance(pictures, list)
    sheet = pixels(pictures._repr_png_())
    enlarged = np.asarray(pictures[1]).repeat(SIDE // 48, 0).repeat(SIDE // 48, 1)
    left = 2 * MARGIN + SIDE
    assert (sheet[MARGIN : MARGIN + SIDE, left : left + SIDE] == enlarged).all()
    pictures.append(Image.new("RGB", (600, 300), "red"))  # a large one is made smaller
    assert pixels(pictures._repr_png_()).shape == (2 * SIDE // 2 + 2 * MARGIN, 3 * (2 * SIDE + MARGIN) + MARGIN, 3)
    assert Pictures()._repr_png_() is None


def test_a_stream_shows_rows_as_they_come(nano, displayed):
    stream = nano.stream(["a photo of a red car", "a photo of a dog"], seed=1, decoding="raster")
    stream._ipython_display_()
    results = {result.request: result for result in stream.results}
    expected = nano.image(["a photo of a red car", "a photo of a dog"], seed=1)
    for place, picture in enumerate(expected):
        assert results[place].output.tobytes() == picture.tobytes() == displayed[-1][place].tobytes()
        assert results[place]._repr_png_() == Pictures([picture])._repr_png_()
        views = list(dict.fromkeys(shown[place].tobytes() for shown in displayed))
        assert len(views) >= 12  # grey, then a row more each time
        assert views[0] == bytes([128]) * len(views[0])
    with pytest.raises(StopIteration):
        next(stream)


def test_a_stream_shows_answers_as_they_grow(nano, displayed):
    picture = nano.image("a photo of a red car", seed=1)[0]
    questions = [("Describe the picture.", [picture]), ("What color is the car?", [picture])]
    nano.stream(questions)._ipython_display_()
    assert repr(displayed[0]) == "\n\n"
    assert repr(displayed[-1]) == "a photo of a red car\n\nred"
    growing = list(dict.fromkeys(shown[0] for shown in displayed))
    assert len(growing) > 3 and all(later.startswith(earlier) for earlier, later in pairwise(growing))


@pytest.mark.parametrize("seconds, least, most", [(0, 14, 14), (100, 3, 4)])
def test_showing_takes_little_of_the_time(nano, displayed, monkeypatch, seconds, least, most):
    """Each look at the clock takes a second, and each preview so many more; grey and the picture are always shown."""
    now, preview = count(), nano.preview

    def slow(grid, ids):
        for _ in range(seconds):
            next(now)
        return preview(grid, ids)

    monkeypatch.setattr("emu3.results._SHOWING_CREDIT", 1)
    # Of this module only: loops of servers that run in other threads need the clock.
    monkeypatch.setattr("emu3.results.time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setitem(nano.__dict__, "preview", slow)
    nano.stream("a photo of a red car", seed=1, decoding="raster")._ipython_display_()
    assert least <= len(displayed) <= most


def test_a_stream_that_is_left_is_given_up(nano):
    stream = nano.stream("a photo of a red car", decoding="raster")
    next(stream)
    assert not nano.engine.idle
    stream.close()
    assert nano.engine.idle and stream.results == []
    with pytest.raises(KeyError):
        nano.stream("a photo of a dog").throw(KeyError("stop"))


def test_the_example_shows_what_it_was_saved_with(nano):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    saved = nbformat.read(EXAMPLE, 4)
    ran = nbformat.read(EXAMPLE, 4)
    nbclient.NotebookClient(ran, timeout=300, kernel_name="python3").execute()
    texts = []
    for before, after in zip(saved.cells, ran.cells, strict=True):
        outputs = [
            [each for each in cell.get("outputs", ()) if each.output_type != "stream"] for cell in (before, after)
        ]
        for one, other in zip(*outputs, strict=True):
            texts.append(other.data["text/plain"])
            assert texts[-1] == one.data["text/plain"]
            assert ("image/png" in one.data) == ("image/png" in other.data)
            if "image/png" in one.data:
                then, now = (pixels(base64.b64decode(each.data["image/png"])) for each in (one, other))
                # A tie of rounding may change a token on another machine.
                assert then.shape == now.shape and (then == now).mean() > 0.9
    assert any("a photo of a red car and a blue tree" in text for text in texts)
