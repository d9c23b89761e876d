"""What known clients send, as they send it."""

import base64
import io
import json

import pytest
from openai import OpenAI
from PIL import Image

from emu3.serving.conversation import read_messages

CAR = "a photo of a red car"


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def same(nano, b64, **options):
    opened = Image.open(io.BytesIO(base64.b64decode(b64)))
    return opened.convert("RGB").tobytes() == nano.image(CAR, **options)[0].tobytes()


def png(nano):
    out = io.BytesIO()
    nano.image(CAR, seed=7)[0].save(out, "PNG")
    return out.getvalue()


def question(nano, text="What color is the car?"):
    url = f"data:image/png;base64,{base64.b64encode(png(nano)).decode()}"
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}]
    return [{"role": "user", "content": parts}]


def test_openai_draws(client, nano):
    found = client.images.generate(model="gpt-image-1", prompt=CAR, n=2, size="1024x1024", extra_body={"seed": 7})
    assert same(nano, found.data[0].b64_json, seed=7) and same(nano, found.data[1].b64_json, seed=8)
    assert (found.size, found.output_format, found.background) == ("48x48", "png", "opaque")
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    assert found.usage.output_tokens_details.image_tokens == found.usage.output_tokens


def test_openai_draws_in_a_stream(client, nano):
    extra = {"seed": 7, "decoding": "raster"}
    stream = client.images.generate(prompt=CAR, stream=True, partial_images=2, extra_body=extra)
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert same(nano, events[-1].b64_json, seed=7, decoding="raster")
    assert events[-1].usage.output_tokens == 159


def test_openai_chats(client, nano):
    answer = client.chat.completions.create(model="nano", messages=question(nano))
    assert answer.choices[0].message.content == "red"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    stream = client.chat.completions.create(
        model="nano",
        messages=question(nano, "Describe the picture."),
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == nano.chat("Describe the picture.", [nano.image(CAR, seed=7)[0]])
    assert chunks[-1].usage.completion_tokens > 1


def test_openai_draws_in_a_chat(client, nano):
    messages = [{"role": "user", "content": f"draw {CAR}"}]
    answer = client.chat.completions.create(model="nano", messages=messages, seed=7)
    assert same(nano, answer.choices[0].message.images[0]["image_url"]["url"].split(",")[1], seed=7)


def test_openai_models(client):
    assert [model.id for model in client.models.list()] == ["nano"]
    assert client.models.retrieve("anything").id == "nano"


def test_openai_edits(client, nano):
    edited = client.images.edit(image=("a.png", png(nano)), prompt="make the car blue", extra_body={"seed": 3})
    opened = Image.open(io.BytesIO(base64.b64decode(edited.data[0].b64_json)))
    (expected,) = nano.edit(nano.image(CAR, seed=7)[0], "make the car blue", seed=3)
    assert opened.tobytes() == expected.tobytes()


def test_open_webui(server, nano):
    """Its default model, options merged into the body, the text before the picture, several pictures to edit."""
    headers = {"authorization": "Bearer none", "x-openwebui-user-name": "a"}
    body = {"model": "dall-e-2", "prompt": CAR, "n": 1, "size": "512x512", "response_format": "b64_json", "seed": 7}
    assert same(nano, server.post("/v1/images/generations", body, **headers).json()["data"][0]["b64_json"], seed=7)
    body = {"model": "gpt-image-1", "prompt": CAR, "n": None, "seed": 7}
    assert same(nano, server.post("/v1/images/generations", body, **headers).json()["data"][0]["b64_json"], seed=7)
    chat = {"stream": True, "model": "nano", "messages": question(nano), "stream_options": {"include_usage": True}}
    chunks = [json.loads(data) for data in server.events("/v1/chat/completions", chat)[:-1]]
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in chunks if each["choices"]) == "red"
    drawn = {"stream": True, "model": "nano", "messages": [{"role": "user", "content": f"draw {CAR}"}]}
    chunks = [json.loads(data) for data in server.events("/v1/chat/completions", drawn)[:-1]]
    (images,) = [each["choices"][0]["delta"]["images"] for each in chunks if "images" in each["choices"][0]["delta"]]
    assert images[0]["type"] == "image_url"
    assert images[0]["image_url"]["url"].startswith("data:image/png;base64")
    files = [("image[]", ("a.png", png(nano), "image/png"))] * 2
    edit = server.client.post("/v1/images/edits", data={"model": "dall-e-2", "prompt": CAR}, files=files)
    assert edit.status_code == 200 and edit.json()["data"][0]["b64_json"]


def test_open_webui_around_a_chat(server, nano):
    """Tools that are offered, the tasks that it gives a model by itself, and what it says of a picture that it got."""
    tools = [{"type": "function", "function": {"name": "generate_image", "parameters": {"type": "object"}}}]
    # An answer that was a picture is left out of the next request.
    messages = [{"role": "user", "content": "draw a photo of two dogs"}, *question(nano)]
    body = {"model": "nano", "stream": False, "messages": messages, "tools": tools, "seed": 7}
    answer = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    assert answer == {"role": "assistant", "content": "red"}
    task = f"### Task:\nGenerate a concise title.\n### Chat History:\n<chat_history>\nUSER: draw {CAR}\n</chat_history>"
    body = {"model": "nano", "messages": [{"role": "user", "content": task}], "stream": False, "max_tokens": 1000}
    assert "images" not in server.post("/v1/chat/completions", body).json()["choices"][0]["message"]
    context = "<context>The requested image has been created by the system successfully.</context>"
    messages = [{"role": "system", "content": context}, {"role": "user", "content": CAR}]
    events = server.events("/v1/chat/completions", {"model": "nano", "messages": messages})
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "stop" and events[-1] == "[DONE]"


def test_librechat(server, nano):
    """openai-node without `response_format`; everything is "auto"."""
    body = {"model": "gpt-image-2.5-flare", "prompt": CAR, "n": 1, "background": "auto", "output_format": "png"}
    body |= {"output_compression": 100, "quality": "auto", "size": "auto", "moderation": "auto", "seed": 7}
    assert same(nano, server.post("/v1/images/generations", body).json()["data"][0]["b64_json"], seed=7)


@pytest.mark.parametrize("size", ["512x512", "1024x768", "4096x8", "8x8"])
def test_invokeai(server, size):
    body = {"model": "custom", "prompt": CAR, "n": 2, "size": size}
    answer = server.post("/v1/images/generations", body, authorization="Bearer required")
    assert len(answer.json()["data"]) == 2
    assert answer.headers["x-request-id"]


def test_sillytavern_and_others_of_automatic1111(server, nano):
    assert server.client.get("/sdapi/v1/options").json()["sd_model_checkpoint"] == "nano"
    body = {"prompt": CAR, "batch_size": 2, "width": 512, "height": 512, "steps": 20, "sampler_name": "Euler a"}
    body |= {"negative_prompt": "", "cfg_scale": 3, "seed": 7, "override_settings": {}, "n_iter": 1}
    answer = server.post("/sdapi/v1/txt2img", body).json()
    assert [same(nano, each, seed=7 + n, guidance_scale=3) for n, each in enumerate(answer["images"])] == [True, True]
    assert json.loads(answer["info"])["all_seeds"] == [7, 8]
    assert len(server.post("/sdapi/v1/txt2img", {"prompt": CAR, "seed": -1}).json()["images"]) == 1


def test_a_chat_of_responses_form(server, nano):
    """Parts as other clients name them."""
    url = question(nano)[0]["content"][1]["image_url"]["url"]
    parts = [{"type": "input_text", "text": "What color is the car?"}, {"type": "input_image", "image_url": url}]
    body = {"messages": [{"role": "developer", "content": "You are a helpful assistant."}]}
    body["messages"].append({"role": "user", "content": parts})
    assert server.post("/v1/chat/completions", body).status_code == 200


def test_messages_that_other_models_take():
    """Several of the system, those of tools, answers that were refused: as the template can say it."""
    messages = [
        {"role": "user", "content": "What is it?"},
        {"role": "system", "content": "Be short."},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]},
        {"role": "tool", "tool_call_id": "1", "content": "a car"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": "Why?"},
    ]
    said = [
        (message["role"], [part["text"] for part in message["content"]]) for message in read_messages(messages, None)
    ]
    assert said == [
        ("system", ["Be short.\n\nBe kind."]),
        ("user", ["What is it?"]),
        ("assistant", []),
        ("user", ["a car"]),
        ("assistant", ["No."]),
        ("user", ["Why?"]),
    ]
