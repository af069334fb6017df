"""The pages in a real browser, at desktop and phone width: nothing is loaded, nothing fails, nothing sticks out.

Screenshots go to the folder that TLTRAIN_SCREENSHOTS names, else to the test's own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ALL, HEAD, made_recipe
from fake_run import fake_run
from PIL import Image

from tltrain.commands.plan import preview
from tltrain.runs.pages.write import write_comparison, write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

pytestmark = pytest.mark.slow
WIDTHS = {"desktop": 1280, "phone": 390}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium: the system's, else the one that `playwright install chromium` fetched."""
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    with playwright.sync_playwright() as running:
        if found is None and not Path(running.chromium.executable_path).exists():
            pytest.skip("there is no Chromium here: install one, or run `playwright install chromium`")
        opened = running.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


def classes_of(num: int) -> list[str]:
    return ["cat", "dog"] if num == 2 else [f"class {i:03} with a name" for i in range(num)]


def report_page(folder: Path, num_classes: int) -> Path:
    run = fake_run(folder / "run", classes_of(num_classes), n=20 * num_classes + 40)
    stages = [HEAD | {"steps": 60}, ALL | {"steps": 60}, ALL | {"name": "mixed", "steps": 60, "mixup": 0.4}]
    preview(made_recipe(stages=stages), run / "preview.png")
    return write_report(run)


def comparison_page(folder: Path, num_runs: int, num_classes: int) -> Path:
    """One, two, or ten runs: two recipes of five seeds."""
    runs = [
        fake_run(
            folder / f"run-{i}",
            classes_of(num_classes),
            n=20 * num_classes + 40,
            skill=0.85 + 0.02 * (i % 5),
            seed=i // 2,
            lr=1e-3 * (1 + i % 2),
        )
        for i in range(num_runs)
    ]
    for run in runs:
        write_report(run)
    return write_comparison(runs, folder / "compare.html", "Two recipes", "Of the same cost.")


PAGES = {
    "report-2-classes": lambda folder: report_page(folder, 2),
    "report-100-classes": lambda folder: report_page(folder, 100),
    "compare-1-run": lambda folder: comparison_page(folder, 1, 2),
    "compare-2-runs-100-classes": lambda folder: comparison_page(folder, 2, 100),
    "compare-10-runs": lambda folder: comparison_page(folder, 10, 10),
}


@pytest.fixture(scope="module", params=PAGES)
def page_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, PAGES[request.param](tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_stands_alone_and_fits(page_file: tuple[str, Path], width: str, scheme: str, browser: Any, tmp_path: Path) -> None:
    name, path = page_file
    page = browser.new_page(viewport={"width": WIDTHS[width], "height": 900}, color_scheme=scheme)
    page.set_default_timeout(180_000)  # a picture of a long page takes its time on a busy machine
    asked, wrong = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_load_state("load")
    shots = Path(os.environ.get("TLTRAIN_SCREENSHOTS") or tmp_path)
    shots.mkdir(parents=True, exist_ok=True)
    shot = shots / f"{name}-{width}-{scheme}.png"
    take_picture(page, shot)
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert wrong == []
    assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS[width], "the page scrolls sideways"
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert page.evaluate(OVERLAPS) == []
    with Image.open(shot) as seen:
        assert seen.width == WIDTHS[width]
        assert len(seen.convert("L").resize((64, 64)).getcolors() or range(999)) > 8, "there is something on it"
    page.close()


def take_picture(page: Any, file: Path, tries: int = 4) -> None:
    """Chromium gives up on a picture of a long page where the machine is busy, and says so; that is no fault of the page."""
    for left in reversed(range(tries)):
        try:
            page.screenshot(path=file, full_page=True)
            return
        except Exception as error:
            if not left or "Unable to capture screenshot" not in str(error):
                raise


OVERLAPS = """
// texts of one chart that lie over one another
[...document.querySelectorAll('.plot')].flatMap(plot => {
  const boxes = [...plot.querySelectorAll('span.xt, span.yt')].map(s => [s.textContent, s.getBoundingClientRect()]);
  return boxes.flatMap(([a, p], i) => boxes.slice(i + 1)
    .filter(([b, q]) => p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 1 && q.top < p.bottom - 1)
    .map(([b]) => `${a} over ${b}`));
})
"""
