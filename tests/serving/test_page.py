"""The page in a real browser. Skipped where there is no Chromium; pictures of what was seen go to out/page/."""

import base64
import io
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from emu3 import Emu3Pipeline
from emu3.clips import read_clip
from emu3.testing import write_tiny_checkpoint

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
sync_api = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
expect = sync_api.expect

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page is not tested")

SHOTS = Path(__file__).parents[2] / "out" / "page"
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
CAR = "a photo of a red car"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(params=[DESK, PHONE], ids=["desk", "phone"])
def page(request, browser, server):
    """The page. What it complains of fails the test, and so does what axe finds where the test ends."""
    context = browser.new_context(viewport=request.param, color_scheme="light", reduced_motion="no-preference")
    page = context.new_page()
    complaints = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(server.url)
    is_ready(page)
    yield page
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{request.node.name}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "it scrolls sideways"
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # no colour is half-way
        found = axe.Axe().run(page).response["violations"]
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []
    context.close()
    assert complaints == []


def is_ready(page):
    """Its scripts listen; before, a click does nothing."""
    expect(page.locator("body[data-ready]")).to_be_attached(timeout=20_000)


def draw(page, seed=7, decoding="raster"):
    page.get_by_test_id("prompt").fill(CAR)
    page.get_by_test_id("seed").fill(str(seed))
    page.get_by_test_id("decoding").select_option(decoding)
    page.get_by_test_id("prompt").press("Escape")
    page.get_by_test_id("draw").click()
    expect(page.get_by_test_id("seed-used")).to_contain_text(str(seed), timeout=20_000)
    expect(page.get_by_test_id("tokens-toggle")).to_be_enabled(timeout=20_000)


def shown(page):
    """The picture that is shown, as its file."""
    url = page.get_by_test_id("picture").locator("img").last.get_attribute("src")
    return base64.b64decode(url.removeprefix("data:image/png;base64,"))


def test_a_picture_is_drawn_before_ones_eyes(page, nano):
    draw(page)
    assert int(page.get_by_test_id("picture").get_attribute("data-previews")) >= 3
    opened = Image.open(io.BytesIO(shown(page)))
    assert opened.tobytes() == nano.image(CAR, seed=7, decoding="raster")[0].tobytes()
    # What it drew is read.
    page.get_by_test_id("sees").click()
    expect(page.get_by_test_id("sees-answer")).to_contain_text("red car", timeout=20_000)
    # It is kept, and found again after a reload; its settings come back.
    page.reload()
    is_ready(page)
    page.get_by_test_id("tab-gallery").click()
    expect(page.get_by_test_id("gallery-item")).to_have_count(1)
    page.get_by_test_id("gallery-item").first.click()
    page.get_by_test_id("use-settings").first.click()
    expect(page.get_by_test_id("prompt")).to_have_value(CAR)
    expect(page.get_by_test_id("seed")).to_have_value("7")


def test_drawing_can_be_cancelled(page, server):
    steps = []
    step = server.worker.engine.step

    def slow():
        time.sleep(0.1)
        steps.append(1)
        return step()

    server.worker.engine.step = slow
    try:
        page.get_by_test_id("prompt").fill(CAR)
        page.get_by_test_id("prompt").press("Escape")
        page.get_by_test_id("decoding").select_option("raster")
        page.get_by_test_id("prompt").press("Control+Enter")
        expect(page.get_by_test_id("cancel")).to_be_visible()
        page.wait_for_timeout(300)
        page.get_by_test_id("cancel").click()
        expect(page.get_by_test_id("draw")).to_be_enabled()
        assert server.is_idle()
    finally:
        del server.worker.engine.step
    assert len(steps) < 140


def test_tokens_are_pinned_and_the_rest_is_drawn_again(page):
    draw(page)
    before = shown(page)
    page.get_by_test_id("tokens-toggle").click()
    cells = page.get_by_test_id("cell")
    expect(cells).to_have_count(144)
    codes = [cells.nth(number).get_attribute("data-code") for number in range(144)]
    for number in (0, 1, 2):
        cells.nth(number).click()
    cells.nth(2).press("ArrowRight")
    page.keyboard.press("Space")
    expect(page.get_by_test_id("token-info")).to_contain_text("probability")
    pinned = [number for number in range(144) if cells.nth(number).get_attribute("aria-selected") == "true"]
    assert pinned == [0, 1, 2, 3]
    page.get_by_test_id("prompt").fill("a photo of a pink key")  # the rest is drawn as the form says now
    page.get_by_test_id("prompt").press("Escape")
    page.get_by_test_id("redraw").click()
    expect(page.get_by_test_id("seed-used")).not_to_contain_text("Seed 7", timeout=20_000)
    expect(page.get_by_test_id("tokens-toggle")).to_be_enabled(timeout=20_000)
    assert shown(page) != before
    expect(cells).to_have_count(144)
    assert [cells.nth(number).get_attribute("data-code") for number in pinned] == codes[:4]
    record = json.loads(Image.open(io.BytesIO(shown(page))).text["emu3"])
    assert record["prompt"] == "a photo of a pink key" and record["kept_tokens"] == 4


def test_four_decoders_race(page):
    page.get_by_test_id("prompt").fill(CAR)
    page.get_by_test_id("prompt").press("Escape")
    page.locator("#race-start").click()
    lanes = page.get_by_test_id("race-lane")
    expect(lanes).to_have_count(4)
    expect(page.locator("[data-testid=race-lane][data-place]")).to_have_count(4, timeout=30_000)
    steps = {
        lanes.nth(number).get_attribute("data-decoding"): int(lanes.nth(number).locator("dd").nth(1).inner_text())
        for number in range(4)
    }
    assert steps["raster"] == 144
    assert max(steps[name] for name in ("predictive", "jacobi", "zipar")) < 60
    expect(page.get_by_test_id("race-verdict")).to_contain_text("first")


def test_a_picture_that_is_dropped_gives_its_settings_back(page, nano):
    record = {"prompt": "a photo of two dogs", "seed": 11, "height": 48, "width": 48, "guidance_scale": 2.0}
    out, text = io.BytesIO(), PngInfo()
    text.add_text("emu3", json.dumps(record))
    nano.image("a photo of two dogs", seed=11)[0].save(out, "PNG", pnginfo=text)
    content = base64.b64encode(out.getvalue()).decode()
    page.evaluate(
        """async (content) => {
            const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "dogs.png", { type: "image/png" }));
            for (const kind of ["dragenter", "dragover", "drop"])
                document.body.dispatchEvent(
                    new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
        }""",
        content,
    )
    expect(page.get_by_test_id("prompt")).to_have_value("a photo of two dogs")
    expect(page.get_by_test_id("seed")).to_have_value("11")


def test_a_chat_about_a_picture(page, nano, tmp_path):
    nano.image("a photo of a purple cat", seed=1)[0].save(tmp_path / "cat.png")
    page.get_by_test_id("tab-chat").click()
    page.get_by_test_id("chat-file").set_input_files(tmp_path / "cat.png")
    page.get_by_test_id("chat-input").fill("What color is the cat?")
    page.get_by_test_id("chat-send").click()
    expect(page.get_by_test_id("chat-answer")).to_contain_text("purple", timeout=20_000)
    # A changed question is another branch; the first one is kept.
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_test_id("chat-edit").fill("What is in the picture?")
    page.get_by_test_id("chat-edit").press("Enter")
    expect(page.get_by_test_id("chat-answer").last).to_contain_text("cat", timeout=20_000)
    expect(page.get_by_test_id("branches").first).to_contain_text("2 of 2")
    # A picture that was drawn as an answer is what the next question is about.
    for text in ("draw: a photo of two dogs", "What is in the picture?"):
        page.get_by_test_id("chat-input").fill(text)
        page.get_by_test_id("chat-send").click()
        expect(page.get_by_test_id("chat-send")).to_be_enabled(timeout=20_000)
        page.wait_for_timeout(300)
    expect(page.get_by_test_id("chat-answer").last).to_contain_text("dog", timeout=20_000)


def test_what_is_wrong_is_said_where_one_looks(page):
    page.get_by_test_id("prompt").fill(CAR)
    page.get_by_test_id("prompt").press("Escape")
    page.get_by_test_id("seed").fill("abc")
    page.get_by_test_id("draw").click()
    status = page.get_by_test_id("status")
    expect(status).to_contain_text("The seed must be a whole number")
    expect(status).to_be_in_viewport()
    page.get_by_test_id("seed").fill("3")
    page.get_by_test_id("draw").click()
    expect(status).to_contain_text("Done", timeout=20_000)


DOG = "a clip of a red dog moving left"


def film(page, seed=3):
    page.get_by_test_id("kind-clip").check()
    page.get_by_test_id("prompt").fill(DOG)
    page.get_by_test_id("seed").fill(str(seed))
    page.get_by_test_id("decoding").select_option("raster")
    page.get_by_test_id("prompt").press("Escape")
    page.get_by_test_id("draw").click()
    expect(page.get_by_test_id("save-webp")).to_be_enabled(timeout=30_000)


def saved(page, format, tmp_path):
    with page.expect_download() as download:
        page.get_by_test_id(f"save-{format}").click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert path.suffix == f".{format}"
    return read_clip(path)


def test_a_clip_is_filmed_played_saved_and_goes_on(page, nano, tmp_path):
    expect(page.get_by_test_id("n")).to_be_visible()
    page.get_by_test_id("kind-clip").check()
    expect(page.get_by_test_id("n")).to_be_hidden()
    expect(page.get_by_test_id("race")).to_be_hidden()
    expect(page.get_by_test_id("frames")).to_have_value("12")
    film(page)
    assert int(page.get_by_test_id("clip-picture").get_attribute("data-previews")) >= 6
    expect(page.get_by_test_id("clip-report")).to_contain_text("12 frames in")
    # It plays in a loop, until it is stopped.
    clip, play = page.get_by_test_id("clip"), page.get_by_test_id("clip-play")
    expect(play).to_have_text("Pause")
    frames = set()
    for _ in range(20):
        frames.add(clip.get_attribute("data-frame"))
        page.wait_for_timeout(70)
    assert len(frames) >= 4
    play.click()
    expect(play).to_have_text("Play")
    page.get_by_test_id("clip-frame").focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(clip).to_have_attribute("data-frame", "1")
    expected = nano.video(DOG, seed=3, frames=12, decoding="raster")[0].frames_THWC
    pixels = clip.evaluate("canvas => [...canvas.getContext('2d').getImageData(0, 0, 48, 48).data]")
    assert (np.array(pixels, np.uint8).reshape(48, 48, 4)[..., :3] == expected[1]).all()
    made = saved(page, "webp", tmp_path)
    assert (made.frames_THWC == expected).all() and made.frames_per_second == 8
    assert len(saved(page, "gif", tmp_path)) == len(saved(page, "mp4", tmp_path)) == 12
    page.get_by_test_id("frames").fill("8")
    page.get_by_test_id("clip-on").click()
    expect(page.get_by_test_id("clip-report")).to_contain_text("20 frames in", timeout=30_000)
    made = saved(page, "webp", tmp_path)
    assert len(made) == 20
    begin = nano.decode(nano.encode_start(read_clip(list(expected)), 8)).frames_THWC
    assert np.abs(made.frames_THWC[:12].astype(int) - begin).mean() < 4
    page.get_by_test_id("kind-picture").check()
    expect(page.get_by_test_id("n")).to_be_visible()
    page.get_by_test_id("kind-clip").check()


def test_nothing_moves_for_who_asks_for_that(page):
    page.emulate_media(reduced_motion="reduce")
    film(page)
    expect(page.get_by_test_id("clip-play")).to_have_text("Play")
    page.wait_for_timeout(400)
    assert page.get_by_test_id("clip").get_attribute("data-frame") == "0"


def after(page):
    url = page.get_by_test_id("after").locator("img").get_attribute("src")
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


def test_a_picture_is_edited_by_words(page, nano, tmp_path):
    picture = nano.image("a photo of a red car and a blue cat", seed=1)[0]
    picture.save(tmp_path / "a.png")
    page.get_by_test_id("tab-edit").click()
    expect(page.get_by_test_id("edit-start")).to_be_disabled()
    page.get_by_test_id("edit-file").set_input_files(tmp_path / "a.png")
    page.get_by_test_id("edit-words").fill("make the cat green")
    page.get_by_test_id("edit-words").press("Enter")
    expect(page.get_by_test_id("edit-on")).to_be_enabled(timeout=20_000)
    assert int(page.get_by_test_id("after").get_attribute("data-previews")) >= 2
    first = after(page)
    seed = json.loads(first.text["emu3"])["seed"]
    assert first.tobytes() == nano.edit(picture, "make the cat green", seed=seed)[0].tobytes() != picture.tobytes()
    # An edit of the edit.
    page.get_by_test_id("edit-on").click()
    page.get_by_test_id("edit-words").fill("remove the car")
    page.get_by_test_id("edit-start").click()
    expect(page.get_by_test_id("edit-save")).to_be_enabled(timeout=20_000)
    second = after(page)
    seed = json.loads(second.text["emu3"])["seed"]
    assert second.tobytes() == nano.edit(first, "remove the car", seed=seed)[0].tobytes()


def test_a_picture_that_was_drawn_is_edited(page):
    draw(page)
    url = page.get_by_test_id("picture").locator("img").last.get_attribute("src")
    page.get_by_test_id("edit-this").click()
    expect(page.get_by_test_id("before").locator("img")).to_have_attribute("src", url)
    expect(page.get_by_test_id("edit-words")).to_be_focused()
    page.get_by_test_id("edit-start").click()
    expect(page.get_by_test_id("status")).to_contain_text("Write what to change first.")


def test_a_story_is_told(page):
    page.get_by_test_id("tab-chat").click()
    page.get_by_role("button", name="Tell a story").click()
    expect(page.get_by_test_id("chat-send")).to_be_enabled(timeout=30_000)
    bubble = page.get_by_test_id("chat-answer").locator(".bubble")
    kinds = bubble.evaluate("bubble => [...bubble.children].map((each) => each.tagName)")
    assert len(kinds) >= 6 and kinds == ["P", "FIGURE"] * (len(kinds) // 2)
    assert bubble.locator("p").first.inner_text() == "Here is a red dog."
    pictures = {bubble.locator("img").nth(number).get_attribute("src") for number in range(len(kinds) // 2)}
    assert len(pictures) == len(kinds) // 2


def test_a_chat_films_and_reads_clips(page, nano, tmp_path):
    page.get_by_test_id("tab-chat").click()
    page.get_by_test_id("chat-input").fill(f"film {DOG}")
    page.get_by_test_id("chat-send").click()
    expect(page.get_by_test_id("chat-send")).to_be_enabled(timeout=30_000)
    image = page.get_by_test_id("chat-answer").locator("img")
    assert len(read_clip(base64.b64decode(image.get_attribute("src").split(",")[1]))) == 12
    page.get_by_role("button", name="Pause").click()
    expect(image).to_be_hidden()
    page.get_by_test_id("chat-input").fill("Describe the clip.")
    page.get_by_test_id("chat-send").click()
    expect(page.get_by_test_id("chat-answer").last).to_contain_text("red dog", timeout=20_000)
    nano.video("a clip of a blue cat growing", seed=1)[0].save(tmp_path / "cat.mp4")
    page.get_by_test_id("chat-new").click()
    page.get_by_test_id("chat-file").set_input_files(tmp_path / "cat.mp4")
    page.get_by_test_id("chat-input").fill("Describe the clip.")
    page.get_by_test_id("chat-send").click()
    expect(page.get_by_test_id("chat-answer").last).to_contain_text("cat growing", timeout=20_000)


def test_what_a_checkpoint_cannot_is_not_offered(browser, serve, tmp_path):
    pipeline = Emu3Pipeline.from_pretrained(write_tiny_checkpoint(tmp_path / "tiny", side=16))
    pipeline.model.config.abilities = ["draw", "read"]
    page = browser.new_context(viewport=PHONE).new_page()
    page.goto(serve(pipeline=pipeline).url)
    is_ready(page)
    expect(page.get_by_test_id("draw")).to_be_visible()
    for name in ("kind", "tab-edit", "edit-this"):
        expect(page.get_by_test_id(name)).to_be_hidden()
    page.get_by_test_id("tab-chat").click()
    expect(page.get_by_role("button", name="Tell a story")).to_have_count(0)
    expect(page.locator("#chat-about")).not_to_contain_text("film")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#panel-gallery")).to_be_visible()
    page.context.close()


def test_clips_are_kept_in_the_gallery(page, nano, tmp_path):
    film(page)
    page.reload()
    is_ready(page)
    page.get_by_test_id("tab-gallery").click()
    item = page.get_by_test_id("gallery-item")
    expect(item).to_have_count(1)
    expect(item).to_contain_text("Clip. Seed 3")
    still = "canvas => [...canvas.getContext('2d').getImageData(0, 0, 48, 48).data]"
    expected = nano.video(DOG, seed=3, frames=12, decoding="raster")[0].frames_THWC
    expect(item.locator("canvas")).to_have_attribute("width", "48")
    pixels = np.array(item.locator("canvas").evaluate(still), np.uint8).reshape(48, 48, 4)
    assert (pixels[..., :3] == expected[0]).all()
    item.click()
    # It plays until it is stopped.
    viewer = page.get_by_test_id("viewer")
    expect(viewer.locator("img")).to_be_visible()
    expect(viewer.get_by_role("button", name="Edit it")).to_have_count(0)
    expect(viewer).to_contain_text("Frames a second")
    viewer.get_by_test_id("turn").click()
    expect(viewer.locator("img")).to_be_hidden()
    expect(viewer.locator("canvas")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_test_id("gallery-download").click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert path.suffix == ".webp" and (read_clip(path).frames_THWC == expected).all()
    page.get_by_test_id("use-settings").click()
    expect(page.get_by_test_id("kind-clip")).to_be_checked()
    for name, value in (("frames", "12"), ("seed", "3"), ("prompt", DOG)):
        expect(page.get_by_test_id(name)).to_have_value(value)
    page.get_by_test_id("tab-gallery").click()
    item.click()
