"""Asks `emu3 serve nano` through the proxy of LiteLLM, as docs/serve.md sets it up, with the `openai` package.

    python tests/clients/litellm_proxy.py [--venv FOLDER]      (`make clients`)

LiteLLM gets an environment of its own, out/clients/litellm/venv by default, which is kept; logs are beside it. Prints a
line for each thing that works; the first one that does not ends it with exit code 1.
"""

import argparse
import base64
import secrets
from pathlib import Path

from background import CAR, OUT, SEED, Servers, documented, drawn_directly, environment, free_port, pixels
from openai import BadRequestError, InternalServerError, OpenAI

LITELLM = "1.108.7"
HERE = OUT / "litellm"


def question(b64: str, text: str) -> list[dict]:
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64}"}}
    return [{"role": "user", "content": [{"type": "text", "text": text}, picture]}]


def ask(proxy: OpenAI, address: str) -> None:
    models = [model.id for model in proxy.models.list()]
    assert models == ["nano"], models
    print("models:", models)

    drawn = drawn_directly(address, CAR)
    found = proxy.images.generate(model="nano", prompt=CAR, extra_body={"seed": SEED})
    assert pixels(found.data[0].b64_json) == pixels(drawn)
    assert found.usage.output_tokens == 159, found.usage
    print("picture: 48x48, the one that emu3 draws itself with this seed")

    asked = {"n": 2, "size": "1024x1024", "response_format": "b64_json", "extra_body": {"seed": SEED}}
    found = proxy.images.generate(model="nano", prompt=CAR, **asked)
    assert len(found.data) == 2 and pixels(found.data[0].b64_json) == pixels(drawn) != pixels(found.data[1].b64_json)
    print("two pictures, with a size and a response format: the nearest size,", found.size)

    try:
        asked = {"stream": True, "partial_images": 2, "extra_body": {"seed": SEED}}
        events = list(proxy.images.generate(model="nano", prompt=CAR, **asked))
    except InternalServerError as error:
        print("pictures in a stream: not in this release of LiteLLM:", error.body["message"].splitlines()[0])
    else:
        assert len(events) == 3 and pixels(events[-1].b64_json) == pixels(drawn)
        print("pictures in a stream:", [event.type for event in events])

    answer = proxy.chat.completions.create(model="nano", messages=question(drawn, "What color is the car?"))
    assert answer.choices[0].message.content == "red", answer
    print("question about the picture:", answer.choices[0].message.content)

    describe = question(drawn, "Describe the picture.")
    usage = {"include_usage": True}
    chunks = list(proxy.chat.completions.create(model="nano", messages=describe, stream=True, stream_options=usage))
    deltas = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(deltas) > 1 and "".join(deltas) == CAR, deltas
    assert chunks[-1].usage.completion_tokens > len(deltas), chunks[-1]
    print("answer in a stream:", deltas)

    messages = [{"role": "user", "content": f"draw {CAR}"}]
    answer = proxy.chat.completions.create(model="nano", messages=messages, seed=SEED)
    assert pixels(answer.choices[0].message.images[0]["image_url"]["url"].split(",")[1]) == pixels(drawn)
    print("picture in a chat: the same one")

    damaged = question(base64.b64encode(b"no picture").decode(), "What is it?")
    for name, reason, send in (
        ("empty prompt", "at least 1 character", lambda: proxy.images.generate(model="nano", prompt="")),
        ("damaged picture", "damaged", lambda: proxy.chat.completions.create(model="nano", messages=damaged)),
    ):
        try:
            send()
        except BadRequestError as error:
            assert reason in error.body["message"], error
            print(f"{name}: status 400,", error.body["message"].splitlines()[0])
        else:
            raise AssertionError(f"{name}: no error")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--venv", type=Path, default=HERE / "venv")
    folder = parser.parse_args().venv
    programs = environment(folder, f"litellm[proxy]=={LITELLM}")
    with Servers(HERE) as servers:
        address, port, key = servers.emu3(), free_port(), f"sk-{secrets.token_hex(32)}"
        config = HERE / "config.yaml"
        config.write_text(documented("model_list:", address))
        command = [programs / "litellm", "--config", config, "--host", "127.0.0.1", "--port", str(port)]
        proxy = f"http://127.0.0.1:{port}"
        # Its list of prices is fetched at every start without the second variable.
        variables = {"LITELLM_MASTER_KEY": key, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        servers.start("litellm", command, f"{proxy}/health/liveliness", **variables)
        print(f"LiteLLM {LITELLM}")
        with OpenAI(base_url=f"{proxy}/v1", api_key=key, max_retries=0) as client:
            ask(client, address)


if __name__ == "__main__":
    main()
