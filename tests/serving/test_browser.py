"""What the page asks for: tokens as they come, pinned tokens, probabilities."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from emu3.generation.events import Finished

CAR = "a photo of a red car"


def events(server, body):
    with server.client.stream("POST", "/api/draw", json=body) as response:
        assert response.status_code == 200, response.read()
        text = "".join(response.iter_text())
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in blocks]


def codes_of(nano, **options):
    (request,) = nano.draw_requests(CAR, **options)
    (event,) = (event for event in nano.engine.stream([request]) if isinstance(event, Finished))
    return request.grammar.codes_of(np.array(event.ids))[0]


def test_every_token_is_told(server, nano):
    heard = events(server, {"prompt": CAR, "seed": 7, "n": 2, "previews": 4, "decoding": "raster"})
    expected = [codes_of(nano, seed=seed, decoding="raster") for seed in (7, 8)]
    found = np.full((2, 12, 12), -1)
    for kind, data in heard:
        if kind == "tokens":
            for row, column, code in data["codes"]:
                assert found[data["picture"], row, column] == -1
                found[data["picture"], row, column] = code
    assert (found == expected).all()
    done = {data["picture"]: data for kind, data in heard if kind == "done"}
    for number, data in done.items():
        assert (data["codes"] == expected[number]).all()
        assert data["steps"] == 144
        assert data["seconds"] > 0.02
        opened = Image.open(io.BytesIO(base64.b64decode(data["url"].removeprefix("data:image/png;base64,"))))
        record = json.loads(opened.text["emu3"])
        assert record == data["record"]
        assert record["seed"] == 7 + number
        options = {name: record[name] for name in ("seed", "height", "width", "decoding")}
        assert nano.image(record["prompt"], **options)[0].tobytes() == opened.tobytes()
    started = [data for kind, data in heard if kind == "started"]
    assert [(data["width"], data["height"], data["length"]) for data in started] == [(12, 12, 159)] * 2
    assert sum(kind == "preview" for kind, _ in heard) >= 3
    decided = [data["decided"] for kind, data in heard if kind == "tokens" and data["picture"] == 0]
    assert decided == sorted(decided) and decided[-1] == 159


def test_pinned_tokens_stay_and_the_rest_is_drawn(server, nano):
    old = codes_of(nano, seed=7)
    pinned = [[int(code) if row < 6 else None for code in line] for row, line in enumerate(old)]
    done = dict(events(server, {"prompt": CAR, "seed": 1000, "pinned": pinned}))["done"]
    assert (np.array(done["codes"])[:6] == old[:6]).all()
    again = dict(events(server, {"prompt": CAR, "seed": 7, "pinned": pinned}))["done"]
    assert (again["codes"] == old).all()


def test_probabilities(server, nano):
    """Those of tokens that were drawn are high, those of others low."""
    codes = codes_of(nano, seed=7)
    wrong = codes.copy()
    wrong[6, 6] = (wrong[6, 6] + 1) % nano.layout.vocabulary.codebook_size
    scores = [
        np.array(server.post("/api/score", {"prompt": CAR, "codes": each.tolist()}).json()["probabilities"])
        for each in (codes, wrong)
    ]
    assert scores[0].shape == (12, 12)
    assert scores[0].mean() > 0.9
    assert scores[1][6, 6] < 0.05
    assert np.allclose(scores[0][:6], scores[1][:6], atol=1e-4)  # what stands before it does not see it


@pytest.mark.parametrize(
    "body",
    [
        {"pinned": []},
        {"pinned": [[]]},
        {"pinned": [[1, 2], [3]]},
        {"pinned": [[99999]]},
        {"pinned": [[-7]]},
        {"pinned": [[2**70]]},
        {"pinned": [[1.5]]},
        {"pinned": [[None] * 100] * 100},
        {"n": 0},
        {"previews": 9},
        {"ratio": "x"},
    ],
)
def test_mistakes_are_refused(server, body):
    answer = server.post("/api/draw", {"prompt": CAR, **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_what_is_loaded(server):
    model = server.client.get("/api/model").json()
    assert (model["name"], model["abilities"], model["factor"]) == ("nano", ["draw", "read", "edit", "film", "tell"], 4)
    assert (model["width"], model["height"]) == (12, 12)
    own = {name: model["options"][name]["default"] for name in ("guidance_scale", "guidance_floor")}
    assert own == {"guidance_scale": 2.5, "guidance_floor": 0.05}
    assert {"purple", "cats"} <= set(model["words"])
    clips = {"frames": 12, "fps": 8.0, "step": 4, "most": 24, "formats": ["webp", "gif", "mp4"]}
    assert model["clips"] == clips


def test_the_page_and_no_other_file(server):
    page = server.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "script-src" not in page.headers["content-security-policy"]  # so default-src: its own files only
    for name in ("../app.py", "..%2fapp.py", "%2e%2e/app.py", "none.js", ".", ""):
        assert server.client.get(f"/page/{name}").status_code in (404, 405), name
