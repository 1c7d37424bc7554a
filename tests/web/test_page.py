"""The page in a real browser, as a visitor uses it."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

import danet
from danet.data.scenes import render
from networks import tiny_danet

pytestmark = pytest.mark.slow
expect.set_options(timeout=30_000)

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> danet.DANet:
    return tiny_danet()


@pytest.fixture(scope="module")
def address(model: danet.DANet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    model.save_pretrained(folder / "model")
    command = [sys.executable, "-m", "danet", "serve", str(folder / "model"), "--port", "0"]
    environment = {**os.environ, "TMPDIR": str(folder), "GRADIO_TEMP_DIR": str(folder / "gradio")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        found = re.search(r"http://127.0.0.1:\d+", server.stdout.readline())
        assert found is not None
        yield found[0]
        server.terminate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if BROWSER is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desktop", "phone"])
def page(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    width, height = request.param
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda sent: asked.append(sent.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    yield page
    context.close()
    outside = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not outside
    assert not errors


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    render(2, 4)[0].save(path)
    return path


def upload(page: Page, photo: Path) -> None:
    page.set_input_files("input[type=file] >> nth=0", str(photo))
    expect(page.locator("#shown img")).to_be_visible()
    expect(page.locator("#legend .legend span").first).to_be_visible()


def shown_pixels(page: Page) -> np.ndarray:
    source = page.locator("#shown img").get_attribute("src")
    assert source is not None
    content = page.request.get(source).body()
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"shown-{os.getpid()}.jpg"
    path.write_bytes(content)
    try:
        return np.asarray(Image.open(path).convert("RGB")).astype(int)
    finally:
        path.unlink()


def test_upload_click_and_download(page: Page, photo: Path, model: danet.DANet) -> None:
    upload(page, photo)
    expected = danet.Predictor(model, device="cpu")(photo)
    before = shown_pixels(page)
    image = page.locator("#shown img")
    box = image.bounding_box()
    assert box is not None
    source = image.get_attribute("src")
    image.click(position={"x": box["width"] * 0.25, "y": box["height"] * 0.5})
    expect(image).not_to_have_attribute("src", source or "")
    facts = page.locator("#facts").inner_text()
    found = re.match(r"Pixel (\d+), (\d+): (class \d), \d+ % sure", facts)
    assert found is not None, facts
    column, row = int(found[1]), int(found[2])
    width, height = Image.open(photo).size
    assert abs(column - width / 4) < 4
    assert abs(row - height / 2) < 4
    assert found[3] == expected.class_names[expected.classes[row, column]]
    expect(page.get_by_label("attention of a pixel")).to_be_checked()
    assert np.abs(shown_pixels(page) - before).max() > 50
    with page.expect_download() as download:
        page.get_by_text("Download the mask").click()
    np.testing.assert_array_equal(np.asarray(Image.open(download.value.path())), expected.classes)


def test_views_and_opacity(page: Page, photo: Path) -> None:
    upload(page, photo)
    image = page.locator("#shown img")
    pictures = [shown_pixels(page)]
    for view in ("position branch", "where branches disagree", "attention of all pixels"):
        source = image.get_attribute("src")
        page.get_by_label(view).check()
        expect(image).not_to_have_attribute("src", source or "")
        pictures.append(shown_pixels(page))
    page.get_by_label("classes", exact=True).check()
    source = image.get_attribute("src")
    page.get_by_role("slider").press("ArrowLeft")
    expect(image).not_to_have_attribute("src", source or "")
    expect(page.locator("#downloads a").last).to_have_attribute("href", re.compile("opacity=0.5$"))
    for one in range(len(pictures)):
        for other in range(one):
            assert np.abs(pictures[one] - pictures[other]).max() > 20


def test_a_pixel_is_chosen_by_keyboard(page: Page, photo: Path, model: danet.DANet) -> None:
    upload(page, photo)
    expected = danet.Predictor(model, device="cpu")(photo)
    before = shown_pixels(page)
    image = page.locator("#shown img")
    source = image.get_attribute("src")
    page.get_by_label("Column of the pixel").fill("70")
    page.get_by_label("Row of the pixel").fill("30")
    page.get_by_label("Row of the pixel").press("Enter")
    expect(image).not_to_have_attribute("src", source or "")
    name = expected.class_names[expected.classes[30, 70]]
    expect(page.locator("#facts")).to_contain_text(f"Pixel 70, 30: {name}")
    assert np.abs(shown_pixels(page) - before).max() > 50
    page.get_by_label("Column of the pixel").fill("100000")
    page.get_by_label("Column of the pixel").press("Enter")
    expect(page.locator("#facts")).to_contain_text("is outside the picture")


def test_an_example_is_one_click_away(page: Page) -> None:
    page.locator("button.gallery-item, .gallery-item").first.click()
    expect(page.locator("#shown img")).to_be_visible()


def test_a_broken_picture_is_explained_and_the_page_goes_on(
    page: Page, photo: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:2000])
    page.set_input_files("input[type=file] >> nth=0", str(broken))
    expect(page.get_by_text("damaged or unreadable")).to_be_visible()
    page.reload()
    upload(page, photo)


def test_what_is_no_picture_is_told_in_our_words(page: Page, tmp_path: Path) -> None:
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    page.set_input_files("input[type=file] >> nth=0", str(text))
    expect(page.get_by_text("text.jpg: not a picture in a known format")).to_be_visible()
    expect(page.get_by_text("preprocess")).to_have_count(0)


def test_many_pictures_come_back_as_one_archive(page: Page, photo: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jpg"
    render(2, 5)[0].save(other)
    (tmp_path / "more").mkdir()
    namesake = tmp_path / "more/photo.png"
    render(2, 6)[0].save(namesake)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    expect(page.get_by_role("tab", name="One picture")).to_be_visible()
    tab = page.get_by_role("tab", name="Many pictures")
    more = page.get_by_label("More tabs")
    expect(tab.or_(more).first).to_be_visible()
    if more.is_visible():
        more.click()
        page.get_by_text("Many pictures").last.click()
    else:
        tab.click()
    page.set_input_files(
        "#batch input[type=file]", [str(path) for path in (photo, other, broken, namesake)]
    )
    expect(page.locator("#batch").get_by_text("broken")).to_be_visible()
    page.get_by_role("button", name="Segment").click()
    expect(page.locator("text=not a picture >> visible=true").first).to_be_visible()
    with page.expect_download() as download:
        page.locator("#archive a").first.click()
    with zipfile.ZipFile(download.value.path()) as archive:
        stems = ("photo", "other", "photo_2")
        names = [name for stem in stems for name in (f"{stem}.png", f"{stem}_overlay.jpg")]
        assert archive.namelist() == names
