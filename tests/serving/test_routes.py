"""The routes, over a real connection, against what the pipeline gives for the same seed."""

import base64
import io
import json

import pytest
from PIL import Image

CAR = "a photo of a red car"


def picture(b64, format_="PNG"):
    opened = Image.open(io.BytesIO(base64.b64decode(b64)))
    assert opened.format == format_
    return opened


def data_url(image, format_="PNG"):
    out = io.BytesIO()
    image.save(out, format_)
    return f"data:image/{format_.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def ask(text, *pictures):
    parts = [{"type": "image_url", "image_url": {"url": data_url(each)}} for each in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_pictures_are_those_of_the_pipeline(server, nano):
    guided = {"guidance_scale": 2.5, "guidance_floor": 0.4}
    answer = server.post("/v1/images/generations", {"prompt": CAR, "seed": 7, "n": 2, **guided}).json()
    expected = nano.image([CAR] * 2, seed=7, **guided)
    found = [picture(each["b64_json"]) for each in answer["data"]]
    assert [each.tobytes() for each in found] == [each.tobytes() for each in expected]
    assert [each["seed"] for each in answer["data"]] == [7, 8]
    assert (answer["size"], answer["output_format"]) == ("48x48", "png")
    prompt, length = len(nano.draw_requests(CAR)[0].prompt_ids), nano.draw_requests(CAR)[0].grammar.length
    empty = len(nano.draw_requests("a", negative_prompt="")[0].guidance.negative_ids)
    assert answer["usage"]["input_tokens"] == 2 * (prompt + empty)
    assert answer["usage"]["output_tokens"] == 2 * length
    record = json.loads(found[1].text["emu3"])
    names = ("seed", "height", "width", "guidance_scale", "guidance_floor")
    again = nano.image(record["prompt"], **{name: record[name] for name in names})
    assert again[0].tobytes() == found[1].tobytes()


def test_a_seed_that_was_not_given_is_told(server, nano):
    (first,) = server.post("/v1/images/generations", {"prompt": CAR}).json()["data"]
    assert picture(first["b64_json"]).tobytes() == nano.image(CAR, seed=first["seed"])[0].tobytes()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("512x512", "48x48"),
        ("auto", "48x48"),
        ("", "48x48"),
        (None, "48x48"),
        ("32x32", "32x32"),
        ("40x20", "40x20"),
        ("1024x768", "56x40"),
        ("1x1", "4x4"),
        ("99999x1000", "480x4"),
    ],
)
def test_the_nearest_size_is_drawn_and_told(server, size, expected):
    answer = server.post("/v1/images/generations", {"prompt": CAR, "size": size}).json()
    assert answer["size"] == expected
    assert "x".join(map(str, picture(answer["data"][0]["b64_json"]).size)) == expected


@pytest.mark.parametrize(("format_", "name"), [("jpeg", "JPEG"), ("webp", "WEBP"), ("jpg", "JPEG")])
def test_formats(server, nano, format_, name):
    body = {"prompt": CAR, "seed": 1, "output_format": format_}
    found = picture(server.post("/v1/images/generations", body).json()["data"][0]["b64_json"], name)
    if name == "WEBP":  # lossless unless a quality is asked for
        assert found.convert("RGB").tobytes() == nano.image(CAR, seed=1)[0].tobytes()
    assert found.size == (48, 48)


def test_a_stream_shows_rows_as_they_are_finished(server, nano):
    """Each preview has a row more of what the picture will be; what is not there yet is grey."""
    body = {"prompt": CAR, "seed": 7, "partial_images": 3, "decoding": "raster"}
    events = [json.loads(data) for data in server.events("/v1/images/generations", body)]
    assert [each["type"].rsplit(".")[-1] for each in events] == ["partial_image"] * 3 + ["completed"]
    assert [each.get("partial_image_index") for each in events] == [0, 1, 2, None]
    pictures = [picture(each["b64_json"]).convert("RGB") for each in events]
    assert pictures[-1].tobytes() == nano.image(CAR, seed=7, decoding="raster")[0].tobytes()
    grey = [sum(pixel == (128, 128, 128) for pixel in each.get_flattened_data()) // 48 for each in pictures]
    assert grey[0] > grey[1] > grey[2] >= 4
    assert events[-1]["usage"]["output_tokens"] == nano.draw_requests(CAR)[0].grammar.length


def test_answers_are_those_of_the_pipeline(server, nano):
    drawn = nano.image(CAR, seed=7)[0]
    question = "What color is the car?"
    answer = server.post("/v1/chat/completions", {"model": "any", "messages": ask(question, drawn)}).json()
    assert answer["choices"][0]["message"]["content"] == nano.chat(question, [drawn]) == "red"
    assert answer["choices"][0]["finish_reason"] == "stop"
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    events = server.events(
        "/v1/chat/completions", {"messages": ask(question, drawn), "stream_options": {"include_usage": True}}
    )
    assert events[-1] == "[DONE]"
    chunks = [json.loads(data) for data in events[:-1]]
    text = "".join(each["choices"][0]["delta"].get("content", "") for each in chunks if each["choices"])
    assert text == "red"
    assert chunks[-1]["usage"] == usage
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"


def test_the_picture_may_be_a_bare_string_and_the_text_too(server, nano):
    drawn = nano.image(CAR, seed=7)[0]
    content = [{"type": "image_url", "image_url": data_url(drawn)}, {"type": "text", "text": "What color is the car?"}]
    answer = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": content}]}).json()
    assert answer["choices"][0]["message"]["content"] == "red"
    text = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3})
    assert text.json()["usage"]["completion_tokens"] <= 3


@pytest.mark.parametrize("text", [f"draw {CAR}", f"/image {CAR}", f"Draw me {CAR}", f" draw {CAR} "])
def test_a_chat_may_draw(server, nano, text):
    expected = nano.image(CAR, seed=3)[0].tobytes()
    body = {"messages": [{"role": "user", "content": text}], "seed": 3}
    message = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    url = message["images"][0]["image_url"]["url"]
    assert picture(url.removeprefix("data:image/png;base64,")).tobytes() == expected
    chunks = [json.loads(data) for data in server.events("/v1/chat/completions", body)[:-1]]
    (images,) = [each["choices"][0]["delta"]["images"] for each in chunks if "images" in each["choices"][0]["delta"]]
    assert images[0]["image_url"]["url"] == url


def test_modalities_ask_for_a_picture(server, nano):
    body = {"messages": [{"role": "user", "content": CAR}], "seed": 3, "modalities": ["image", "text"]}
    message = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    url = message["images"][0]["image_url"]["url"]
    assert picture(url.removeprefix("data:image/png;base64,")).tobytes() == nano.image(CAR, seed=3)[0].tobytes()


def test_unknown_fields_are_ignored_and_null_is_absent(server, nano):
    body = {"prompt": CAR, "seed": 7, "n": None, "size": None, "quality": "auto", "style": None, "background": "auto"}
    body |= {
        "moderation": "low",
        "user": "somebody",
        "response_format": "b64_json",
        "model": "dall-e-2",
        "unheard": [1],
    }
    (found,) = server.post("/v1/images/generations", body).json()["data"]
    assert picture(found["b64_json"]).tobytes() == nano.image(CAR, seed=7)[0].tobytes()


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("images/generations", {}, "prompt", "required"),
        ("images/generations", {"prompt": ""}, "prompt", "at least 1"),
        ("images/generations", {"prompt": " "}, None, "prompt must not be empty"),
        ("images/generations", {"prompt": CAR, "n": 11}, "n", "10"),
        ("images/generations", {"prompt": CAR, "size": "big"}, "size", "WIDTHxHEIGHT"),
        ("images/generations", {"prompt": CAR, "size": "0x5"}, "size", "WIDTHxHEIGHT"),
        ("images/generations", {"prompt": CAR, "top_p": 2}, "top_p", "top_p must be above 0 and at most 1"),
        ("images/generations", {"prompt": CAR, "decoding": "magic"}, None, "unknown decoding 'magic'"),
        ("images/generations", {"prompt": CAR, "guidance_scale": 1e9}, "guidance_scale", "guidance_scale must be"),
        ("images/generations", {"prompt": CAR, "output_format": "gif"}, "output_format", "png"),
        ("images/generations", {"prompt": "a " * 3000}, None, "do not fit the model's context of 1024"),
        ("videos", {}, "prompt", "required"),
        ("videos", {"prompt": CAR, "frames": 6}, "frames", "multiple of 4 frames, got 6; nearest: 4 or 8"),
        ("videos", {"prompt": CAR, "frames": 4}, "frames", "ask for 8"),
        ("videos", {"prompt": CAR, "frames": 400}, None, "ask for fewer frames"),
        ("videos", {"prompt": CAR, "seconds": "long"}, "seconds", "number"),
        ("videos", {"prompt": CAR, "seconds": 0}, "seconds", "greater than 0"),
        ("videos", {"prompt": CAR, "fps": -1}, "fps", "greater than or equal to 0.001"),
        ("videos", {"prompt": CAR, "size": "big"}, "size", "WIDTHxHEIGHT"),
        ("videos", {"prompt": CAR, "guidance_floor": 2}, "guidance_floor", "from 0 to 1"),
        ("videos", {"prompt": CAR, "input_reference": "x"}, "input_reference", "data URLs"),
        ("chat/completions", {"messages": []}, "messages", "at least 1"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "size": "big"}, "size", "WIDTHxHEIGHT"),
        ("chat/completions", {"messages": [{"role": "function", "content": "x"}]}, "messages.0.role", "one of"),
        ("chat/completions", {"messages": [{"role": [], "content": "x"}]}, "messages.0.role", "one of"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "messages.0.content",
            "parts",
        ),
        ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "text or a list"),
    ],
)
def test_mistakes_are_told(server, path, body, param, words):
    answer = server.post(f"/v1/{path}", body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert error["param"] == param
    assert answer.reason_phrase == error["message"][:200].rstrip()  # where clients show the status line only
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["x-request-id"].startswith("req_")


def test_the_other_routes(server):
    get = server.client.get
    assert [each["id"] for each in get("/v1/models").json()["data"]] == ["nano"]
    assert get("/models").json() == get("/v1/models").json()
    assert get("/v1/models/gpt-image-1").json()["id"] == "nano"
    assert get("/health").json() == {"status": "ok"} and get("/ready").json() == {"status": "ready"}
    assert get("/v1/videos").json()["object"] == "list"
    assert get("/v1/videos/video_1").status_code == get("/v1/videos/video_1/content").status_code == 404
    assert server.client.delete("/v1/videos/video_1").status_code == 404
    assert get("/nowhere").json()["error"]["type"] == "invalid_request_error"
    assert server.client.put("/v1/models").status_code == 405


def test_metrics_count(server):
    def value(name):
        lines = server.client.get("/metrics").text.splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith(f"{name} ")))

    before = (
        value("emu3_tokens_total"),
        value('emu3_finished_total{reason="stop"}'),
        value("emu3_first_row_seconds_count"),
    )
    answer = server.post("/v1/images/generations", {"prompt": CAR, "n": 3}).json()
    after = (
        value("emu3_tokens_total"),
        value('emu3_finished_total{reason="stop"}'),
        value("emu3_first_row_seconds_count"),
    )
    assert [b - a for a, b in zip(before, after, strict=True)] == [answer["usage"]["output_tokens"], 3, 3]
    assert value("emu3_tokens_per_second") > 0
    assert value("emu3_tokens_per_step") > 1
    assert value("emu3_lanes") == value("emu3_waiting_requests") == 0
