"""The page of `danet serve` in headless Chromium: first paint, and how soon a click is answered.

python benchmarks/page.py street-small
"""

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from results_file import add_results_option, commit, write_rows

from danet.bench.report import hardware
from danet.data.scenes import render

PAINTED = "performance.getEntriesByName('first-contentful-paint').map(entry => entry.startTime)[0]"
CHANGED = """source => {
    const image = document.querySelector('#shown img');
    return image.src != source && image.complete;
}"""


def load(page: Page, address: str) -> tuple[float, float]:
    """Milliseconds to the first paint and until a photo can be dropped."""
    start = time.perf_counter()
    page.goto(address)
    page.wait_for_selector("text=Drop a photo")
    usable = 1000 * (time.perf_counter() - start)
    return page.evaluate(PAINTED), usable


def click(page: Page, share: float) -> float:
    """Milliseconds from a click to the picture of that pixel's attention."""
    image = page.locator("#shown img")
    source = image.get_attribute("src")
    box = image.bounding_box()
    start = time.perf_counter()
    image.click(position={"x": box["width"] * share, "y": box["height"] * 0.6})
    page.wait_for_function(CHANGED, arg=source)
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_results_option(parser)
    parser.add_argument("model")
    parser.add_argument("--loads", type=int, default=5)
    parser.add_argument("--clicks", type=int, default=20)
    args = parser.parse_args()
    command = [sys.executable, "-m", "danet", "serve", args.model, "--port", "0"]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        photo = Path(folder) / "photo.png"
        render(2, 4)[0].resize((512, 512)).save(photo)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            address = re.search(r"http://127.0.0.1:\d+", server.stdout.readline())[0]
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            paints, usables = zip(
                *(load(browser.new_context().new_page(), address) for _ in range(args.loads)),
                strict=True,
            )
            page = browser.new_context().new_page()
            load(page, address)
            start = time.perf_counter()
            page.set_input_files("input[type=file] >> nth=0", str(photo))
            page.wait_for_selector("#shown img")
            first = 1000 * (time.perf_counter() - start)
            clicks = [click(page, (n + 0.5) / args.clicks) for n in range(args.clicks)]
            browser.close()
            server.terminate()
    figures = {
        "first paint": paints,
        "page usable": usables,
        "first picture segmented (512x512)": [first],
        "click answered (512x512)": clicks,
    }
    rows = []
    for what, values in figures.items():
        row = {"commit": commit(), "model": args.model, "what": what}
        row |= {"median_ms": round(statistics.median(values)), "largest_ms": round(max(values))}
        rows.append({**row, "runs": len(values), "hardware": hardware("cpu")})
        print(rows[-1], flush=True)
    write_rows(args.results / "page.csv", rows)


if __name__ == "__main__":
    main()
