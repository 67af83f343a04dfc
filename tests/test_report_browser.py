"""report.html and compare.html in a browser: nothing is asked of the network, no page is wider than
a phone, every picture is there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import made_runs
import pytest

from qirl_fast.reporting.page import write_page
from qirl_fast.reporting.run import read_run
from qirl_fast.reporting.several import compared

LONG = "a photo of " + "a very-long-word-that-nothing-breaks" * 8
JUDGES = ("alignment", "a_judge_of_a_long_name_from_some_module:score")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report and a comparison, of runs with long names and texts and large pictures."""
    folder = tmp_path_factory.mktemp("pages")
    runs = []
    for k in range(3):
        name = f"a-run-with-a-long-name-{k}"
        rewards = {JUDGES[0]: 0.7, JUDGES[1]: 0.3}
        more = {"names": JUDGES, "rewards": rewards, "lift": 0.1 * k, "seed": k}
        rows = made_runs.metric_rows(40, JUDGES)
        rows = [row | {"grad_norm": 1.02e-3 + 2.5e-6 * u} for u, row in enumerate(rows)]
        runs.append(made_runs.make(folder / name, rows=rows, size=320, texts=[LONG] * 6, **more))
    (folder / "compare.html").write_text(compared([read_run(run) for run in runs]), "utf-8")
    return {"report": write_page(runs[0]), "compare": folder / "compare.html"}


@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("which", ["report", "compare"])
def test_a_page_fits_and_is_whole(
    browser: Any, pages: dict[str, Path], which: str, width: int
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, offline=True)
    page, asked, said = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(pages[which].as_uri())
    page.wait_for_function("[...document.images].every(i => i.complete)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.images].filter(i => !i.naturalWidth).length") == 0
    assert page.evaluate("document.images.length") > 8
    # Text is at least 11 pixels high, labels of charts on the screen too.
    small = page.evaluate(
        """() => [...document.querySelectorAll("p, td, th, b, small, span, li, figcaption, text")]
        .filter(e => e.textContent.trim() && e.checkVisibility())
        .map(e => [e.textContent.trim().slice(0, 30), e.getBoundingClientRect().height])
        .filter(([, height]) => height < 11)"""
    )
    assert small == []
    cut = page.evaluate(
        """() => [...document.querySelectorAll("svg text")]
        .filter(e => e.getBoundingClientRect().left < e.closest("svg").getBoundingClientRect().left)
        .map(e => e.textContent)"""
    )
    assert cut == [], "labels beside a chart"
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == [] == said
    context.close()
