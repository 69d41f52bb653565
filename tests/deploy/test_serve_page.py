"""The page of ``hidiff-serve`` in a real browser: a picture, its previews, cancelling, errors."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from needs import chromium
from PIL import Image
from playwright import sync_api

from hidiff_runtime import Pipeline
from tests.deploy.serve import Served

pytestmark = pytest.mark.needs("chromium")

PROMPT = "a lighthouse at dusk"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60_000


@pytest.fixture(scope="module")
def served(sd15_bundle: Path) -> Iterator[Served]:
    with Served(sd15_bundle, "--limit", "pictures=200", "--resident", "all") as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sync_api.BrowserContext]:
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=chromium(), headless=True, args=FLAGS
        )
        context.set_default_timeout(PATIENCE)
        yield context
        context.close()


@pytest.fixture
def page(browser: sync_api.BrowserContext, served: Served) -> Iterator[sync_api.Page]:
    """The page, ready to be used; whatever its script complains of fails the test."""
    opened = browser.new_page()
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.goto(served.url)
    opened.wait_for_selector("#generate:enabled")
    yield opened
    opened.close()
    assert not complaints


def drawn(page: sync_api.Page) -> np.ndarray:
    """The picture that the page shows, read back from its download link."""
    with page.expect_download() as download:
        page.get_by_text("Download").click()
    assert download.value.suggested_filename == "a-lighthouse-at-dusk-3.png"
    return np.asarray(Image.open(download.value.path()))


def test_a_prompt_becomes_the_pipelines_picture(page: sync_api.Page, sd15_bundle: Path) -> None:
    page.evaluate(WATCH)
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Seed").fill("3")
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector("#result:not([hidden])")
    with Pipeline.open(sd15_bundle) as pipe:
        assert np.array_equal(drawn(page), pipe(PROMPT, seed=3))
        assert not np.array_equal(drawn(page), pipe(PROMPT, seed=4))
    seen = page.evaluate("window.seen")
    assert [re.sub(r" · .*", "", told) for told in seen["steps"]] == [f"step {step} of 3" for step in (1, 2, 3)]
    assert seen["phases"] == ["strided", "windowed"]
    assert len(set(seen["previews"])) == 3
    assert "seed\n3" in page.locator("#parameters").inner_text()


WATCH = """() => {
  const seen = window.seen = { steps: [], phases: [], previews: [] };
  const note = (list, value) => { if (value && list.at(-1) !== value) list.push(value); };
  new MutationObserver(() => {
    note(seen.steps, document.getElementById("step").textContent);
    note(seen.phases, document.getElementById("phase").textContent);
    const picture = document.getElementById("picture");
    if (picture.classList.contains("soft")) note(seen.previews, picture.src);
  }).observe(document.getElementById("stage"), {
    subtree: true, childList: true, characterData: true, attributes: true,
  });
}"""


def test_the_recipes_example_prompts_are_offered(page: sync_api.Page) -> None:
    field = page.get_by_label("Prompt", exact=True)
    assert field.get_attribute("placeholder") == "a boat on a lake"
    page.get_by_role("button", name=PROMPT).click()
    assert field.input_value() == PROMPT
    page.get_by_role("button", name="a boat on a lake").click()
    assert field.input_value() == "a boat on a lake"


def test_cancel_ends_the_run(page: sync_api.Page, served: Served) -> None:
    before, cancelled = served.count("hidiff_pictures_total"), served.count("hidiff_cancellations_total")
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Pictures", exact=True).fill("200")
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector("#bar i[data-phase]")
    page.get_by_role("button", name="Cancel").click()
    assert page.get_by_role("alert").inner_text() == "Cancelled."
    assert page.get_by_role("button", name="Generate").is_enabled()
    served.eventually("hidiff_cancellations_total", cancelled + 1)
    assert served.count("hidiff_pictures_total") < before + 200


def test_an_error_is_shown_and_the_next_picture_is_made(page: sync_api.Page) -> None:
    page.get_by_label("Prompt", exact=True).fill("long " * 500)
    page.get_by_role("button", name="Generate").click()
    assert "prompt is too long" in page.get_by_role("alert").inner_text()
    assert page.locator("#result").is_hidden()
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector("#result:not([hidden])")
    assert page.get_by_role("alert").is_hidden()


def test_a_seed_of_minus_one_is_random_and_shown(page: sync_api.Page) -> None:
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Seed").fill("-2")
    page.get_by_role("button", name="Generate").click()
    assert not page.get_by_label("Seed").evaluate("(input) => input.validity.valid")
    assert page.locator("#result").is_hidden()
    page.get_by_label("Seed").fill("-1")
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector("#result:not([hidden])")
    assert re.search(r"seed\n\d", page.locator("#parameters").inner_text())


def test_pictures_are_kept_and_their_settings_used_again(page: sync_api.Page) -> None:
    for seed in ("1", "2"):
        page.get_by_label("Prompt", exact=True).fill(PROMPT)
        page.get_by_label("Seed").fill(seed)
        page.get_by_role("button", name="Generate").click()
        page.wait_for_selector("#result:not([hidden])")
        page.wait_for_selector("#generate:enabled")
    page.get_by_role("img", name=f"{PROMPT}, seed 1").click()
    assert "seed\n1" in page.locator("#parameters").inner_text()
    page.get_by_role("button", name="Use these settings").click()
    assert page.get_by_label("Seed").input_value() == "1"


def test_a_picture_is_the_start(page: sync_api.Page, sd15_bundle: Path) -> None:
    start = Image.new("RGB", (64, 64), (40, 80, 160))
    content = io.BytesIO()
    start.save(content, "PNG")
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Seed").fill("3")
    page.get_by_text("Start from a picture").click()
    file = {"name": "start.png", "mimeType": "image/png", "buffer": content.getvalue()}
    page.get_by_label("Image", exact=True).set_input_files([file])
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector("#result:not([hidden])")
    with Pipeline.open(sd15_bundle) as pipe:
        assert np.array_equal(drawn(page), pipe(PROMPT, seed=3, image=start, resize=True))
    assert "strength" in page.locator("#parameters").inner_text()


def test_a_key_is_asked_for_and_kept(browser: sync_api.BrowserContext, sd15_bundle: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("right\n")
    with Served(sd15_bundle, "--api-key-file", keys, "--resident", "all") as server:
        page = browser.new_page()
        page.goto(server.url)
        for key, told in (("wrong", "A key is needed"), ("right", "tiny · 128 × 128")):
            page.get_by_label("API key").fill(key)
            page.get_by_label("API key").blur()
            page.get_by_role("status").filter(has_text=told).wait_for()
        page.reload()
        page.get_by_role("status").filter(has_text="tiny").wait_for()
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_cut_off_and_text_can_be_read(page: sync_api.Page, width: int, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("label", "button", "header p", "summary"):
        assert page.evaluate(CONTRAST, name) >= 4.5, name


CONTRAST = """(selector) => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const light = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [red, green, blue] = [...canvas.getImageData(0, 0, 1, 1).data].map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const behind = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" ? behind(element.parentElement) : colour;
  };
  const element = document.querySelector(selector);
  const pair = [light(getComputedStyle(element).color), light(behind(element))].sort((one, other) => other - one);
  return (pair[0] + 0.05) / (pair[1] + 0.05);
}"""
