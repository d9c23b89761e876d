"""The route that edits pictures: forms as clients send them, against what the pipeline gives for the same seed."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from emu3.pipeline import Emu3Pipeline
from emu3.testing import write_tiny_checkpoint

CAR = "a photo of a red car"


def form(server, picture, data, mask=None, name="image"):
    files = [(name if picture else "other", ("a.png", picture or b"", "image/png"))]
    files += [("mask", ("m.png", mask, "image/png"))] if mask else []
    return server.client.post("/v1/images/edits", data=data, files=files)


def file_of(picture):
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def test_a_masked_part_is_drawn_anew(server, nano):
    picture = nano.image(CAR, seed=1)[0]
    alpha = np.full((48, 48), 255, np.uint8)
    alpha[:, 24:] = 0  # transparent: drawn anew
    mask = Image.fromarray(np.dstack([np.asarray(picture), alpha]), "RGBA")
    data = {"prompt": "a photo of a red car and a blue tree", "seed": "5", "n": "2", "output_format": "png"}
    for name in ("image", "image[]"):
        answer = form(server, file_of(picture), data, file_of(mask), name)
        assert answer.status_code == 200, answer.text
        made = [Image.open(io.BytesIO(base64.b64decode(each["b64_json"]))) for each in answer.json()["data"]]
    expected = nano.complete(picture, [data["prompt"]] * 2, mask=alpha == 0, seed=5)
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(made, expected, strict=True))
    assert [each["seed"] for each in answer.json()["data"]] == [5, 6]
    kept = np.asarray(nano.decode(nano.encode_visual(picture)))[:, :20].astype(int)
    assert np.abs(kept - np.asarray(made[0])[:, :20]).mean() < 4  # norms see the whole picture, so not to the last bit


def test_edits_by_a_checkpoint_that_has_learned_them(serve, tmp_path):
    pipeline = Emu3Pipeline.from_pretrained(write_tiny_checkpoint(tmp_path / "tiny", side=16))
    picture = Image.effect_noise((16, 16), 64).convert("RGB")
    server = serve(pipeline=pipeline)
    data = {"prompt": "make it blue", "seed": "5", "stream": "true", "partial_images": "1"}
    answer = form(server, file_of(picture), data)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[-1]["type"] == "image_edit.completed"
    made = Image.open(io.BytesIO(base64.b64decode(events[-1]["b64_json"])))
    assert np.array_equal(np.asarray(made), np.asarray(pipeline.edit(picture, "make it blue", seed=5)[0]))
    files = [("image[]", ("a.png", file_of(picture), "image/png"))] * 2
    answer = server.client.post("/v1/images/edits", data={"prompt": "mix them", "seed": "1"}, files=files)
    (expected,) = pipeline.edit([[picture, picture]], ["mix them"], seed=1)
    made = Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
    assert np.array_equal(np.asarray(made), np.asarray(expected))
    assert answer.json()["usage"]["input_tokens"] > 40


@pytest.mark.parametrize(
    ("picture", "data", "mask", "words"),
    [
        (False, {"prompt": CAR}, None, "needs a picture"),
        (True, {}, None, "prompt"),
        (True, {"prompt": CAR, "n": "11"}, None, "10"),
        (True, {"prompt": CAR, "n": "many"}, None, "integer"),
        (True, {"prompt": CAR, "size": "32x32"}, True, "a mask goes with one picture"),
        (b"no picture", {"prompt": CAR}, True, "this is no picture"),
        (True, {"prompt": CAR}, b"no picture", "this is no picture"),
        (True, {"prompt": CAR}, "small", "the mask has 8x8 pixels, and the picture 48x48"),
        (True, {"prompt": CAR}, "opaque", "nothing is to be drawn"),
    ],
)
def test_wrong_edits(server, picture, data, mask, words):
    holes = Image.new("RGBA", (8, 8) if mask == "small" else (48, 48), (0, 0, 0, 255 if mask == "opaque" else 0))
    mask = file_of(holes) if isinstance(mask, str | bool) else mask
    picture = file_of(Image.new("RGB", (48, 48))) if picture is True else picture
    answer = form(server, picture, data, mask)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text
    assert server.is_idle()
