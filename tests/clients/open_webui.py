"""Draws and asks in Open WebUI, in a headless browser, with `emu3 serve nano` behind it.

    python tests/clients/open_webui.py [--venv FOLDER] [--browser PROGRAM]      (`make clients`)

Open WebUI gets an environment of its own, out/clients/open-webui/venv by default, which is kept, and a folder for its
data, which is not. Logs and pictures of what was seen are beside the environment. Prints a line for each thing that
works; the first one that does not ends it with exit code 1.
"""

import argparse
import json
import shlex
import shutil
import tempfile
from pathlib import Path

from background import CAR, OUT, ROOT, SEED, Servers, documented, drawn_directly, environment, free_port, pixels
from playwright.sync_api import Locator, Page, expect, sync_playwright

OPEN_WEBUI = "0.12.4"
HERE = OUT / "open-webui"
CATS = "a photo of four cats"
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def settings(address: str) -> dict[str, str]:
    """Environment variables: those of docs/serve.md, a seed, and what a test without a network needs."""
    lines = documented("export OPENAI_API_BASE_URL", address).splitlines()
    words = [word for line in lines if line.startswith("export ") for word in shlex.split(line, comments=True)[1:]]
    user = dict(word.split("=", 1) for word in words)
    # Parameters of models go into each request of a chat, those of images into each request of the image button.
    user["DEFAULT_MODEL_PARAMS"] = json.dumps({**json.loads(user["DEFAULT_MODEL_PARAMS"]), "seed": SEED})
    return {
        **user,
        "IMAGES_OPENAI_PARAMS": json.dumps({"seed": SEED}),
        "WEBUI_AUTH": "False",
        "WEBUI_SECRET_KEY": "for this run only",
        "OFFLINE_MODE": "true",
        "HF_HUB_OFFLINE": "1",
        "RAG_EMBEDDING_ENGINE": "openai",  # none is asked, and none loaded
        "ENABLE_OLLAMA_API": "false",
    }


def new_chat(page: Page) -> None:
    page.goto("/")
    expect(page.locator("#model-selector-model-button")).to_contain_text("nano")


def send(page: Page, text: str, picture: bytes | None = None) -> Locator:
    """Send a message, with a picture: where the answer to it will be."""
    answers = page.locator(".chat-assistant")
    before = answers.count()
    if picture is not None:
        file = {"name": "car.png", "mimeType": "image/png", "buffer": picture}
        page.locator("input[type=file]").first.set_input_files(file)
        expect(page.locator("form img[src^='data:image'], form img[src*='/api/v1/files/']")).to_be_visible()
    page.locator("#chat-input").fill(text)
    page.keyboard.press("Enter")
    expect(answers).to_have_count(before + 1)
    return answers.last


def picture_in(page: Page, answer: Locator) -> bytes:
    """The file of the picture that an answer shows."""
    picture = answer.locator("img[src*='/api/v1/files/']")
    expect(picture).to_be_visible(timeout=60_000)
    return page.request.get(picture.get_attribute("src")).body()


def deltas(frames: list[str]) -> list[str]:
    """The pieces of text of the answers that came to the browser."""
    events = [json.loads(frame[2:])[1]["data"] for frame in frames if frame.startswith('42["events"')]
    pieces = [event["data"] for event in events if event["type"] == "response:completion"]
    return [piece["delta"] for piece in pieces if piece.get("type") == "response.output_text.delta"]


def use(page: Page, address: str) -> None:
    frames: list[str] = []
    page.on("websocket", lambda socket: socket.on("framereceived", lambda frame: frames.append(str(frame))))
    drawn = pixels(drawn_directly(address, CAR))

    page.goto("/")
    page.get_by_role("button", name="Okay, Let's Go!").click()
    new_chat(page)
    print("model: nano is offered, and chosen")

    page.locator("#integration-menu-button").click()
    page.get_by_role("menu").get_by_text("Image", exact=True).click()
    page.keyboard.press("Escape")
    car = picture_in(page, send(page, CAR))
    assert pixels(car) == drawn
    page.screenshot(path=HERE / "button.png")
    print("image button: a PNG of 48x48 in the chat, the one that emu3 draws itself with this seed")

    headers = {"authorization": f"Bearer {page.evaluate('localStorage.token')}"}
    (image,) = page.request.post("/api/v1/images/generations", data={"prompt": CAR}, headers=headers).json()
    assert pixels(page.request.get(image["url"]).body()) == drawn
    print("/api/v1/images/generations: the same picture")
    refused = page.request.post("/api/v1/images/generations", data={"prompt": ""}, headers=headers)
    assert refused.status == 400 and "at least 1 character" in refused.text(), refused.text()
    print("/api/v1/images/generations, empty prompt: status 400,", refused.json()["detail"])

    new_chat(page)
    frames.clear()
    expect(send(page, "Describe the picture.", car)).to_have_text(CAR, timeout=60_000)
    assert len(deltas(frames)) > 1 and "".join(deltas(frames)) == CAR, deltas(frames)
    print("answer about an uploaded picture, in a stream:", deltas(frames))

    new_chat(page)
    expect(send(page, "What color is the car?", car)).to_have_text("red", timeout=60_000)
    print("question about an uploaded picture: red")
    cats = pixels(picture_in(page, send(page, f"draw {CATS}")))
    assert cats == pixels(drawn_directly(address, CATS))
    print('"draw ..." in the chat: again a picture that emu3 draws itself')
    expect(page.locator("[data-sonner-toast]")).to_have_count(0, timeout=30_000)
    page.screenshot(path=HERE / "chat.png")
    expect(send(page, "draw")).to_contain_text("prompt must not be empty", timeout=60_000)
    print('"draw" without words: the chat says', page.locator(".chat-assistant").last.inner_text())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--venv", type=Path, default=HERE / "venv")
    parser.add_argument("--browser", default=shutil.which("chromium") or shutil.which("google-chrome"))
    options = parser.parse_args()
    # A pinned torch lets pip take a CPU build where one lies at hand.
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    (torch,) = (pin for pin in pins if pin.startswith("torch=="))
    programs = environment(options.venv, f"open-webui=={OPEN_WEBUI}", torch)
    with tempfile.TemporaryDirectory() as data, Servers(HERE) as servers:
        address, port = servers.emu3(), free_port()
        web = f"http://127.0.0.1:{port}"
        command = [programs / "open-webui", "serve", "--host", "127.0.0.1", "--port", str(port)]
        servers.start("open-webui", command, f"{web}/health", DATA_DIR=data, **settings(address))
        print(f"Open WebUI {OPEN_WEBUI}")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=options.browser, args=QUIET)
            page = browser.new_page(base_url=web, viewport={"width": 1280, "height": 800})
            try:
                use(page, address)
            finally:
                page.screenshot(path=HERE / "end.png")
                browser.close()


if __name__ == "__main__":
    main()
