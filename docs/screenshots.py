"""The pictures of the page in README and docs, taken anew: `make screenshots`. Needs Chromium.

With names, such as `python docs/screenshots.py clip edit`, only those.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

DOCS = Path(__file__).parent
PROMPT, SEED = "a photo of a red cat and a blue dog", "20"


def draw(page: Page) -> None:
    page.get_by_test_id("prompt").fill(PROMPT)
    page.get_by_test_id("seed").fill(SEED)
    page.get_by_test_id("prompt").press("Escape")
    page.get_by_test_id("draw").click()
    expect(page.get_by_test_id("tokens-toggle")).to_be_enabled(timeout=60_000)


def tokens(page: Page) -> None:
    """Some tokens of a picture are pinned."""
    draw(page)
    page.get_by_test_id("tokens-toggle").click()
    cells = page.get_by_test_id("cell")
    for row in range(4):
        for column in range(4):
            cells.nth(12 * row + column).click()
    cells.nth(12 * 1 + 8).hover()
    page.screenshot(path=DOCS / "page-tokens.png")


def race(page: Page) -> None:
    """All decoders draw the same."""
    page.get_by_test_id("prompt").fill(PROMPT)
    page.get_by_test_id("seed").fill(SEED)
    page.get_by_test_id("prompt").press("Escape")
    page.locator("#race-start").click()
    expect(page.locator("[data-testid=race-lane][data-place]")).to_have_count(4, timeout=60_000)
    page.locator("#race").screenshot(path=DOCS / "page-race.png")


def chat(page: Page) -> None:
    """A conversation about a picture."""
    draw(page)
    page.locator("#ask-about").click()
    for question in ("Describe the picture.",):
        page.get_by_test_id("chat-input").fill(question)
        page.get_by_test_id("chat-send").click()
        expect(page.get_by_test_id("chat-send")).to_be_enabled(timeout=60_000)
        page.wait_for_timeout(1_000)
    page.screenshot(path=DOCS / "page-chat.png")


def clip(page: Page) -> None:
    """A clip, stopped at a frame."""
    page.get_by_test_id("kind-clip").check()
    page.get_by_test_id("prompt").fill("a clip of a red dog and a blue car crossing")
    page.get_by_test_id("seed").fill("3")
    page.get_by_test_id("prompt").press("Escape")
    page.get_by_test_id("draw").click()
    expect(page.get_by_test_id("save-webp")).to_be_enabled(timeout=60_000)
    page.get_by_test_id("clip-play").click()
    page.get_by_test_id("clip-frame").fill("3")
    page.screenshot(path=DOCS / "page-clip.png")


def edit(page: Page) -> None:
    """A picture before and after."""
    draw(page)
    page.get_by_test_id("edit-this").click()
    page.get_by_test_id("edit-words").fill("make the dog green")
    page.get_by_test_id("edit-start").click()
    expect(page.get_by_test_id("edit-on")).to_be_enabled(timeout=60_000)
    page.locator("#edit-form").screenshot(path=DOCS / "page-edit.png")


def story(page: Page) -> None:
    """A story with its pictures."""
    page.get_by_test_id("tab-chat").click()
    page.get_by_role("button", name="Tell a story").click()
    expect(page.get_by_test_id("chat-send")).to_be_enabled(timeout=60_000)
    page.locator("#chat-log").screenshot(path=DOCS / "page-story.png")


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    command = [sys.executable, "-m", "emu3", "serve", "nano", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        views = {tokens: (1280, 980, "light"), race: (1280, 980, "light"), chat: (390, 800, "dark")}
        views |= {clip: (1280, 900, "light"), edit: (1000, 800, "light"), story: (600, 800, "dark")}
        views = {take: view for take, view in views.items() if take.__name__ in (sys.argv[1:] or [take.__name__])}
        for take, (width, height, scheme) in views.items():
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(url)
            expect(page.locator("body[data-ready]")).to_be_attached()
            take(page)
            page.close()
        browser.close()
        server.terminate()


if __name__ == "__main__":
    main()
