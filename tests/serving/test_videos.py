"""Clips: asked for by OpenAI's own client, looked after, fetched in each format, and given up."""

import io
import sys
import threading
import time

import av
import numpy as np
import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from openai.types import Video
from PIL import Image

from emu3 import Emu3Pipeline
from emu3.clips import Clip, read_clip
from emu3.pictures import data_url
from emu3.results import Result
from emu3.segments import Visual
from emu3.serving import films, live, pictures, videos
from emu3.testing import write_tiny_checkpoint

DOG = "a clip of a red dog moving left"
# OpenAI is about to shut down its own service of this form.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def finished(server, made):
    """A clip by its id, when it is made."""
    end = time.monotonic() + 60
    while (film := server.client.get(f"/v1/videos/{made['id']}").json())["status"] in ("queued", "in_progress"):
        assert time.monotonic() < end
        time.sleep(0.05)
    return film


def content(server, film, **query):
    answer = server.client.get(f"/v1/videos/{film['id']}/content", params=query)
    assert answer.status_code == 200, answer.text
    return answer.content, answer.headers["content-type"]


def test_openai_makes_a_clip(client, nano):
    extra = {"seed": 3, "decoding": "raster"}
    made = client.videos.create(model="sora-2", prompt=DOG, seconds="12", size="1280x1280", extra_body=extra)
    assert (made.object, made.status, made.model, made.prompt) == ("video", "queued", "sora-2", DOG)
    film = client.videos.poll(made.id, poll_interval_ms=100)
    assert (film.status, film.progress, film.size, film.error) == ("completed", 100, "48x48", None)
    assert film.seconds == "2" and film.frames == 16  # what is learned of the 12 s that were asked for
    assert film.created_at <= film.completed_at < film.expires_at
    expected = nano.video(DOG, frames=16, seed=3, decoding="raster")[0]
    found = read_clip(client.videos.download_content(film.id, extra_query={"format": "webp"}).read())
    assert np.array_equal(found.frames_THWC, expected.frames_THWC) and found.frames_per_second == 8
    with av.open(io.BytesIO(client.videos.download_content(film.id).read())) as opened:
        frames = [each.to_ndarray(format="rgb24") for each in opened.decode(video=0)]
        assert opened.format.name.startswith("mov") and opened.streams.video[0].average_rate == 8
    assert np.abs(np.stack(frames).astype(int) - expected.frames_THWC).mean() < 12
    thumbnail = Image.open(io.BytesIO(client.videos.download_content(film.id, variant="thumbnail").read()))
    assert (thumbnail.format, thumbnail.size) == ("WEBP", (48, 48))
    sheet = Image.open(io.BytesIO(client.videos.download_content(film.id, variant="spritesheet").read()))
    assert (sheet.format, sheet.size) == ("JPEG", (192, 192))
    assert next(iter(client.videos.list())).id == film.id
    assert client.videos.delete(film.id).deleted
    with pytest.raises(NotFoundError, match="no such clip"):
        client.videos.retrieve(film.id)


def test_openai_begins_with_a_picture(client, nano):
    picture = nano.image("a photo of a red dog", seed=1)[0]
    file = io.BytesIO()
    picture.save(file, "PNG")
    made = client.videos.create(prompt=DOG, input_reference=("a.png", file.getvalue()), extra_body={"seed": 3})
    film = client.videos.poll(made.id, poll_interval_ms=100)
    found = read_clip(client.videos.download_content(film.id, extra_query={"format": "webp"}).read())
    expected = nano.video(DOG, start=picture, seed=3)[0]
    assert np.array_equal(found.frames_THWC, expected.frames_THWC)
    with pytest.raises(BadRequestError, match="no picture"):
        client.videos.create(prompt=DOG, input_reference=("a.png", b"\x89PNG\r\n\x1a\nno"))


def test_openai_films_again_and_goes_on(client, server, nano):
    """From a clip's first frames, and behind its last; as large and fast, with its settings where none are given."""
    own = {"frames": 8, "fps": 4, "seed": 3, "temperature": 0.7, "decoding": "raster"}
    film = client.videos.create_and_poll(prompt=DOG, model="sora-2", poll_interval_ms=100, extra_body=own)
    small = client.videos.create_and_poll(prompt=DOG, size="64x16", poll_interval_ms=100, extra_body={"frames": 8})
    assert client.videos.remix(small.id, prompt=DOG).size == small.size != film.size
    with pytest.raises(BadRequestError, match="not finished"):
        client.videos.remix(client.videos.create(prompt=DOG, extra_body=own).id, prompt=DOG)
    (first,) = nano.results(nano.video_requests(DOG, **own))

    def file_of(name):
        return client.videos.download_content(name, extra_query={"format": "webp"}).read()

    def frames(made):
        made = client.videos.poll(made.id, poll_interval_ms=100)
        assert made.status == "completed", made.error
        return made, read_clip(file_of(made.id)).frames_THWC

    def extend(name, seconds="2"):  # the client's own method takes files only
        body = {"prompt": other, "seconds": seconds, "video": {"id": name}}
        return client.post("/videos/extensions", body=body, cast_to=Video)

    other = "a clip of a red dog moving up"
    made, found = frames(client.videos.remix(film.id, prompt=other))
    assert (made.remixed_from_video_id, made.prompt, made.model, made.seed) == (film.id, other, "sora-2", 3)
    start = Visual(first.codes_THW[:1])
    assert np.array_equal(found, nano.results(nano.video_requests(other, start=start, **own))[0].output.frames_THWC)
    assert client.videos.remix(film.id, prompt=other, extra_body={"seed": 9}).seed == 9
    made, found = frames(extend(film.id))
    assert (made.seconds, made.frames, made.fps, made.seed, made.remixed_from_video_id) == ("4", 16, 4, 3, None)
    more = nano.video_requests(other, start=Visual(first.codes_THW), **own | {"frames": 16})
    assert np.array_equal(found, nano.results(more)[0].output.frames_THWC)  # its own codes, not those of its frames
    file = file_of(film.id)
    extra = {name: own[name] for name in ("seed", "temperature", "decoding")}
    made, found = frames(client.videos.extend(prompt=other, seconds="2", video=("a.webp", file), extra_body=extra))
    assert np.array_equal(found, nano.video(other, start=first.output, **own | {"frames": 16})[0].frames_THWC)
    known = [each.id for each in client.videos.list(limit=2)]  # page after page
    assert known[0] == made.id and film.id in known[3:]
    assert extend(film.id, "0.1").frames == 12  # four frames at least
    with pytest.raises(BadRequestError, match="has 24 frames to begin with"):
        client.videos.extend(prompt=other, seconds="4", video=("a.gif", gif_of(24)))
    with pytest.raises(NotFoundError, match="no such clip"):
        extend("video_1")
    with pytest.raises(BadRequestError, match="a file in a form"):
        extend(1)
    form = {"prompt": other, "seconds": "2", "video[id]": film.id}
    answer = server.client.post("/v1/videos/extensions", files={name: (None, text) for name, text in form.items()})
    assert answer.json()["seconds"] == "4"
    with pytest.raises(BadRequestError, match="remix films anew"):
        client.videos.edit(prompt="make it blue", video=("a.webp", file))
    with pytest.raises(BadRequestError, match="input_reference gives a picture"):
        client.videos.create_character(name="dog", video=("a.webp", file))


def gif_of(frames):
    file = io.BytesIO()
    Clip(np.random.default_rng(0).integers(0, 256, (frames, 48, 48, 3), dtype=np.uint8), 8).save(file, "gif")
    return file.getvalue()


def test_clips_go_on_and_are_had_as_gif(server, nano):
    start = nano.video(DOG, frames=8, seed=3)[0]
    body = {"prompt": DOG, "seed": 4, "frames": 16, "input_reference": {"image_url": webp(start)}}
    film = finished(server, server.post("/v1/videos", body).json())
    assert (film["seconds"], film["frames"], film["fps"]) == ("2", 16, 8)
    found = read_clip(content(server, film, format="webp")[0])
    expected = nano.extend(start, DOG, frames=8, seed=4)
    assert np.array_equal(found.frames_THWC, expected.frames_THWC)
    made, kind = content(server, film, format="gif")
    assert kind == "image/gif" and len(read_clip(made)) == 16


def webp(clip):
    file = io.BytesIO()
    clip.save(file, "webp")
    return data_url(file.getvalue(), "image/webp")


def test_the_list_has_pages(server, nano):
    for film in server.app.state.service.films:
        server.client.delete(f"/v1/videos/{film.id}")
    ids = [server.post("/v1/videos", {"prompt": DOG, "frames": 8}).json()["id"] for _ in range(3)]
    get = server.client.get
    first = get("/v1/videos", params={"limit": 2}).json()
    assert ([each["id"] for each in first["data"]], first["has_more"]) == (ids[:0:-1], True)
    rest = get("/v1/videos", params={"limit": 2, "after": first["last_id"]}).json()
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == (ids[:1], False)
    assert [each["id"] for each in get("/v1/videos", params={"order": "asc"}).json()["data"]] == ids
    wrong = get("/v1/videos", params={"after": "video_1"})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "after"
    assert get("/v1/videos", params={"limit": 0}).status_code == 400
    for each in ids:
        assert server.client.delete(f"/v1/videos/{each}").json()["deleted"]
    assert server.is_idle() and get("/v1/videos").json()["data"] == []


def test_one_that_is_deleted_is_given_up(server):
    step, worker = server.worker.engine.step, server.worker
    worker.engine.step = lambda: (time.sleep(0.05), step())[1]
    try:
        made = server.post("/v1/videos", {"prompt": DOG, "frames": 24, "decoding": "raster"}).json()
        early = server.client.get(f"/v1/videos/{made['id']}/content")
        assert early.status_code == 400 and early.json()["error"]["code"] == "not_finished"
        time.sleep(0.5)
        assert 0 <= server.client.get(f"/v1/videos/{made['id']}").json()["progress"] < 50
        server.client.delete(f"/v1/videos/{made['id']}")
        assert server.is_idle()
    finally:
        del worker.engine.step


def test_what_cannot_be_done(server, serve, tmp_path, monkeypatch):
    film = finished(server, server.post("/v1/videos", {"prompt": DOG, "frames": 8}).json())
    monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
    answer = server.client.get(f"/v1/videos/{film['id']}/content")
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "format")
    assert "pip install -e '.[video]' in the clone" in error["message"] and "format=webp" in error["message"]
    assert content(server, film, format="webp")[1] == "image/webp"
    pipeline = Emu3Pipeline.from_pretrained(write_tiny_checkpoint(tmp_path / "tiny", side=16))
    pipeline.model.config.abilities = ["draw"]
    answer = serve(pipeline=pipeline).post("/v1/videos", {"prompt": DOG})
    assert answer.status_code == 400 and "makes no clips" in answer.json()["error"]["message"]


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(films, "_MOST_FINISHED", 3)
    monkeypatch.setattr(films, "_MOST_BYTES", 250)
    store, made = films.Films(None), [films.Film({}) for _ in range(5)]
    for film, side in zip(made, (1, 1, 1, 1, 8), strict=True):
        film.end(
            Result(0, Clip(np.zeros((1, side, side, 3), np.uint8)), (), "stop", codes_THW=np.zeros((1, 1, 1), int))
        )
        store.keep(film)
    assert list(store) == made[2:]
    made[4].clip = Clip(np.zeros((9, 8, 8, 3), np.uint8))  # alone too large: it is kept, and no other
    assert list(store) == made[4:]
    monkeypatch.setattr(films, "_KEPT_SECONDS", -2)
    assert list(store) == []


def test_files_are_written_where_nobody_waits_for_them(server, monkeypatch):
    wrote = []

    def noted(function):
        def note(*arguments, **keywords):
            wrote.append(threading.current_thread())
            return function(*arguments, **keywords)

        return note

    monkeypatch.setattr(pictures, "_MANY_PIXELS", 0)
    monkeypatch.setattr(Image.Image, "save", noted(Image.Image.save))
    for module in (videos, live):
        monkeypatch.setattr(module, "sheet_of", noted(films.sheet_of))
    film = finished(server, server.post("/v1/videos", {"prompt": DOG, "frames": 8}).json())
    for query in ({"variant": "thumbnail"}, {"variant": "spritesheet"}, {"format": "gif"}):
        content(server, film, **query)
    server.events("/api/film", {"prompt": DOG, "frames": 8, "previews": 1})
    story = [{"role": "user", "content": "Tell a story about a red dog."}]
    for path, body in (
        ("/v1/images/generations", {"prompt": "a photo of a red dog"}),
        ("/v1/chat/completions", {"messages": story}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": f"film {DOG}"}]}),
    ):
        assert server.post(path, body).status_code == 200
    assert len(wrote) > 12 and server.thread not in wrote


@pytest.mark.parametrize(
    ("body", "size", "frames", "fps"),
    [
        ({"size": "16x64"}, "16x64", 12, 8),
        ({"size": "1x1"}, "4x4", 12, 8),
        ({"size": "300x1", "frames": 8}, "400x4", 8, 8),
        ({"seconds": 3600}, "48x48", 16, 8),  # what is learned
        ({"seconds": "0.001"}, "48x48", 8, 8),  # the fewest that move
        ({"seconds": 1, "fps": 12}, "48x48", 12, 12),
        ({"frames": 24, "seconds": 1}, "48x48", 24, 8),
        ({"frames": 8, "fps": 500}, "48x48", 8, 500),
        ({"frames": 8, "fps": 0.001}, "48x48", 8, 0.001),
    ],
)
def test_how_large_and_long_and_fast(server, body, size, frames, fps):
    film = finished(server, server.post("/v1/videos", {"prompt": DOG, "seed": 1, **body}).json())
    assert (film["status"], film["size"], film["frames"], film["fps"]) == ("completed", size, frames, fps)
    assert film["seconds"] == f"{frames / fps:g}"
    made = read_clip(content(server, film, format="webp")[0])
    assert made.frames_THWC.shape[1:3] == tuple(map(int, size.split("x")))[::-1] and len(made) == frames
    gif = server.client.get(f"/v1/videos/{film['id']}/content", params={"format": "gif"})
    assert gif.status_code == (200 if 0.01 < fps < 50 else 400)
    assert gif.status_code == 200 or gif.json()["error"]["param"] == "format"


def begin(frames, rate):
    file = io.BytesIO()
    Clip(np.random.default_rng(0).integers(0, 256, (frames, 48, 48, 3), dtype=np.uint8), rate).save(file, "mp4")
    return data_url(file.getvalue(), "video/mp4")


@pytest.mark.parametrize(
    ("body", "start", "param", "words"),
    [
        ({"size": "0x5"}, None, "size", "WIDTHxHEIGHT"),
        ({"seconds": 0}, None, "seconds", "greater than 0"),
        ({"seconds": 3601}, None, "seconds", "3600"),
        ({"seconds": "nan"}, None, "seconds", "3600"),
        ({"fps": 501}, None, "fps", "500"),
        ({"fps": 0.0001}, None, "fps", "0.001"),
        ({"frames": 7}, None, "frames", "nearest: 4 or 8"),
        ({"frames": 4}, None, "frames", "ask for 8"),
        ({"frames": 28}, None, None, "fewer frames"),
        ({"frames": 16}, (8, 600), "fps", "has 600 frames a second; give fps, at most 500"),
        ({"frames": 8}, (8, 8), "frames", "has 8 already"),
        ({"seconds": 0.5}, (8, 8), "seconds", "8 frames to begin with, and of what is asked for 8 fit"),
        ({"seconds": 9}, (24, 8), "seconds", "give a shorter one"),
    ],
)
def test_what_no_clip_can_be(server, body, start, param, words):
    body = {"prompt": DOG, **body} | ({"input_reference": begin(*start)} if start else {})
    answer = server.post("/v1/videos", body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param) and words in error["message"], error


def test_so_many_are_made_and_kept(server, monkeypatch):
    store = server.app.state.service.films
    for film in store:
        server.client.delete(f"/v1/videos/{film.id}")
    body = {"prompt": DOG, "frames": 8, "size": "4x4"}
    monkeypatch.setattr(films, "_MOST_UNFINISHED", 2)
    step, engine = server.worker.engine.step, server.worker.engine
    engine.step = lambda: (time.sleep(0.2), step())[1]
    try:
        first, second = (server.post("/v1/videos", body).json() for _ in range(2))
        full = server.post("/v1/videos", body)
        assert (full.status_code, full.json()["error"]["code"], full.headers["retry-after"]) == (429, "queue_full", "1")
        server.client.delete(f"/v1/videos/{first['id']}")
        third = server.post("/v1/videos", body).json()  # there is room again
    finally:
        del engine.step
    ids = [finished(server, each)["id"] for each in (second, third)]
    assert [film.id for film in store] == ids
    for limit, most in (("_MOST_FINISHED", 2), ("_MOST_BYTES", 2 * 8 * 4 * 4 * 3)):
        with monkeypatch.context() as patch:
            patch.setattr(films, limit, most)
            ids.append(finished(server, server.post("/v1/videos", body).json())["id"])
            assert server.is_idle() and [film.id for film in store] == ids[-2:]
