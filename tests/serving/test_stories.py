"""What a chat answers beside words: clips that are read and made, stories with pictures; and the same for the page."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from emu3 import Emu3Pipeline
from emu3.clips import Clip, read_clip
from emu3.testing import write_tiny_checkpoint

DOG = "a clip of a red dog moving left"
STORY = [{"role": "user", "content": "Tell a story about a red dog."}]


def data_url(clip, format):
    file = io.BytesIO()
    clip.save(file, format)
    kind = "video/mp4" if format == "mp4" else f"image/{format}"
    return f"data:{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def opened(url):
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


def events(server, path, body):
    with server.client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        text = "".join(response.iter_text())
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for kind, data in blocks]


def asked(url, text="Describe the clip."):
    parts = [{"type": "text", "text": text}, {"type": "video_url", "video_url": {"url": url}}]
    return {"messages": [{"role": "user", "content": parts}]}


@pytest.mark.parametrize("format", ["mp4", "gif", "webp"])
def test_clips_are_read(server, nano, format):
    clip = nano.video(DOG, seed=1)[0]
    answer = server.post("/v1/chat/completions", asked(data_url(clip, format))).json()
    again = read_clip(base64.b64decode(data_url(clip, format).split(",")[1]))
    said = answer["choices"][0]["message"]["content"]
    assert said == nano.chat("Describe the clip.", [again]) == DOG
    assert answer["usage"]["prompt_tokens"] > 3 * 157


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:video/mp4;base64,AAAA", "cannot read the clip"),
        ("data:video/mp4;base64,?", "does not hold base64"),
        ("data:text/plain;base64,AAAA", "clips are read from data URLs only"),
        ("https://example.com/a.mp4", "clips are read from data URLs only"),
        ("file:///etc/passwd", "clips are read from data URLs only"),
        (None, "a clip is given as a data URL"),
        ("long", "do not fit the model's context"),
        ("large", "pixels"),
    ],
)
def test_clips_that_cannot_be_read(server, url, words):
    if url in ("long", "large"):
        side, count = (16, 200) if url == "long" else (1600, 21)
        frames = np.zeros((count, side, side, 3), np.uint8)
        frames[:, 0, 0, 0] = np.arange(count)
        url = data_url(Clip(frames, 8), "webp")
    answer = server.post("/v1/chat/completions", asked(url))
    assert answer.status_code == 400 and words in answer.json()["error"]["message"], answer.text


def test_a_chat_films(server, nano):
    for command in ("film", "/video", "Film me:"):
        body = {"messages": [{"role": "user", "content": f"{command} {DOG}"}], "seed": 3}
        message = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]
        (image,) = message["images"]
        made = read_clip(base64.b64decode(image["image_url"]["url"].removeprefix("data:image/webp;base64,")))
        assert np.array_equal(made.frames_THWC, nano.video(DOG, seed=3)[0].frames_THWC)


def test_a_chat_tells(server, nano):
    expected = nano.tell(STORY, seed=3)
    sentences = [part for part in expected if isinstance(part, str)]
    pictures = [part for part in expected if not isinstance(part, str)]
    assert len(pictures) >= 3 and sentences[0] == "Here is a red dog."
    body = {"messages": STORY, "seed": 3}
    message = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    assert message["content"] == "\n\n".join(sentences)
    assert [each["index"] for each in message["images"]] == list(range(len(pictures)))
    for image, picture in zip(message["images"], pictures, strict=True):
        assert opened(image["image_url"]["url"]).tobytes() == picture.tobytes()
    ends = [len("\n\n".join(sentences[: place + 1])) for place in range(len(pictures))]
    assert [each["after"] for each in message["images"]] == ends
    # In a stream the parts come in turn.
    chunks = [json.loads(data) for data in server.events("/v1/chat/completions", body)[:-1]]
    deltas = [each["choices"][0]["delta"] for each in chunks]
    assert "".join(each.get("content", "") for each in deltas) == message["content"]
    assert [image for each in deltas for image in each.get("images", [])] == message["images"]
    text = ""
    for delta in deltas:
        text += delta.get("content", "")
        assert all(image["after"] == len(text) for image in delta.get("images", []))


def test_modalities_say_what_an_answer_has(server, nano):
    body = {"messages": [{"role": "user", "content": "a photo of a red car"}], "seed": 3}
    drawn = server.post("/v1/chat/completions", {**body, "modalities": ["image", "text"]}).json()
    assert len(drawn["choices"][0]["message"]["images"]) == 1
    story = {**body, "messages": [{"role": "user", "content": "A story about a red dog."}]}
    told = server.post("/v1/chat/completions", {**story, "modalities": ["text", "image"]}).json()
    message = told["choices"][0]["message"]
    parts = nano.tell(story["messages"], seed=3)
    assert message["content"] == "\n\n".join(part for part in parts if isinstance(part, str))


def test_a_story_needs_a_checkpoint_that_tells(serve, tmp_path):
    pipeline = Emu3Pipeline.from_pretrained(write_tiny_checkpoint(tmp_path / "tiny", side=16))
    pipeline.model.config.abilities = ["read"]
    server = serve(pipeline=pipeline)
    message = server.post("/v1/chat/completions", {"messages": STORY, "max_tokens": 4}).json()["choices"][0]["message"]
    assert "images" not in message
    answer = server.post("/api/tell", {"messages": STORY})
    assert answer.status_code == 400 and "does not put pictures into its answers" in answer.json()["error"]["message"]


def test_the_page_sees_a_story(server, nano):
    expected = nano.tell(STORY, seed=3)
    heard = events(server, "/api/tell", {"messages": STORY, "seed": 3, "previews": 2})
    parts, previews = [""], 0
    for kind, data in heard:
        if kind == "text":
            parts[-1] += data["text"]
        elif kind == "picture":
            parts += [opened(data["url"]), ""]
        previews += kind == "preview"
    parts = [part for part in parts if part != ""]
    assert [part if isinstance(part, str) else part.tobytes() for part in parts] == [
        part if isinstance(part, str) else part.tobytes() for part in expected
    ]
    assert previews >= 3 and heard[-1][0] == "done"


def test_the_page_sees_a_clip_frame_by_frame(server, nano):
    heard = events(server, "/api/film", {"prompt": DOG, "seed": 3, "frames": 12, "previews": 11, "decoding": "raster"})
    done = heard[-1][1]
    expected = nano.video(DOG, seed=3, frames=12, decoding="raster")[0]
    made = read_clip(base64.b64decode(done["url"].removeprefix("data:image/webp;base64,")))
    assert np.array_equal(made.frames_THWC, expected.frames_THWC) and made.frames_per_second == 8
    rows = [data["rows"] for kind, data in heard if kind == "preview"]
    assert rows == sorted(rows) and {row // 12 for row in rows} >= {0, 1, 2}
    sheet = np.asarray(opened(done["sheet"])).reshape(3, 48, 4, 48, 3).swapaxes(1, 2).reshape(12, 48, 48, 3)
    assert np.array_equal(sheet, expected.frames_THWC) and done["columns"] == 4
    record = done["record"]
    again = nano.video(record["prompt"], **{name: record[name] for name in ("seed", "frames", "fps", "decoding")})[0]
    assert np.array_equal(again.frames_THWC, expected.frames_THWC) and record["guidance_agreement"] == 0
    gif = server.client.get(f"/v1/videos/{done['id']}/content", params={"format": "gif"}).content
    assert len(read_clip(gif)) == 12
    # It goes on.
    heard = events(server, "/api/film", {"prompt": DOG, "seed": 4, "frames": 16, "start": done["url"]})
    more = nano.extend(expected, DOG, frames=4, seed=4)
    made = read_clip(base64.b64decode(heard[-1][1]["url"].split(",")[1]))
    assert np.array_equal(made.frames_THWC, more.frames_THWC)
    assert heard[-1][1]["record"]["kept_tokens"] == 3 * 144


def test_the_page_sees_an_edit(server, nano):
    picture = nano.image("a photo of a red car and a blue cat", seed=1)[0]
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    body = {"prompt": "make the cat green", "picture": url, "seed": 2, "previews": 4}
    heard = events(server, "/api/edit", body)
    assert sum(kind == "preview" for kind, _ in heard) >= 2
    made = opened(heard[-1][1]["url"])
    assert made.tobytes() == nano.edit(picture, body["prompt"], seed=2)[0].tobytes() != picture.tobytes()
    assert json.loads(made.text["emu3"])["from_pictures"] == 1
    mask = Image.new("L", (48, 48))
    mask.paste(255, (24, 0, 48, 48))
    file = io.BytesIO()
    mask.save(file, "PNG")
    body |= {"mask": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"}
    made = opened(events(server, "/api/edit", body)[-1][1]["url"])
    assert made.tobytes() == nano.complete(picture, body["prompt"], mask=mask, seed=2)[0].tobytes()
    for wrong in ({"picture": "x"}, {"prompt": ""}, {"mask": "x"}):
        assert server.post("/api/edit", body | wrong).status_code == 400
