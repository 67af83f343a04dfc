"""The arena in a browser: votes by click and by key, back, reload, a killed server, results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_studies import write_model, write_rows

from qirl_fast.arena.store import TOO_FAST_S, Store

PROMPTS = 8
LONG_MS = 120_000  # a loaded machine; nothing here waits without a reason

pytest.importorskip("gradio", reason="pip install 'qirl-fast[arena]'")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """Eight prompts, two of them edits; the texts hold HTML."""
    models = {}
    for name, shade in (("base", 10), ("rl", 100)):
        models[name] = str(tmp_path / name)
        rows = write_model(tmp_path / name, shade, n=PROMPTS, size=(64, 64), edits=2)
        html = "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script>"
        write_rows(tmp_path / name, [row | {"prompt": row["prompt"] + html} for row in rows])
    file = tmp_path / "arena.yaml"
    file.write_text(json.dumps({"models": models, "database": str(tmp_path / "votes.db")}))
    return file


@contextmanager
def served(settings: Path, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server process, killed without notice at the end, and its address."""
    command = [sys.executable, "-m", "qirl_fast.arena", str(settings), f"port={port}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None
        yield found[0], process
    finally:
        process.kill()
        process.wait()


class Rater:
    """A person at the page."""

    def __init__(self, browser, url: str, name: str) -> None:
        self.page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
        self.page.set_default_timeout(LONG_MS)
        self.foreign: list[str] = []
        self.page.on("request", self._asked)
        self.host = re.match(r"http://[^/]+", url)[0]
        self.page.goto(url)
        self.page.wait_for_selector("#arena-hello")
        self.page.fill("#arena-name :is(input, textarea)", name)
        self.page.keyboard.press("Enter")
        self.at(1)

    def _asked(self, request) -> None:
        if not request.url.startswith((self.host, "data:", "blob:")):
            self.foreign.append(request.url)

    def at(self, place: int | str) -> None:
        """Wait for a question and its pictures, and look at them as long as is asked of people."""
        self.page.wait_for_selector(f"#arena-pair[data-place='{place}']", state="attached")
        self.page.wait_for_function(
            "[...document.querySelectorAll('#arena-pair img')].every(i => i.naturalWidth)"
        )
        self.page.wait_for_timeout(1000 * TOO_FAST_S + 200)

    def press(self, key: str, then: int | str) -> None:
        self.page.keyboard.press(key)
        self.at(then)

    def click(self, side: str, then: int | str) -> None:
        self.page.click(f"#arena-{side}")
        self.at(then)

    def text(self, where: str = "#arena-pair") -> str:
        return str(self.page.inner_text(where))


def votes(settings: Path) -> list[tuple[str, str, str]]:
    store = Store(settings.with_name("votes.db"))
    found = [(v.rater, v.item.prompt, v.choice) for v in store.votes()]
    store.close()
    assert len({vote[:2] for vote in found}) == len(found)  # nobody counts twice
    return found


def settled(settings: Path, n: int) -> list[tuple[str, str, str]]:
    """The votes once there are n, and a moment later, when a doubled one would have come."""
    until = time.monotonic() + LONG_MS / 1000
    while len(votes(settings)) < n and time.monotonic() < until:
        time.sleep(0.2)
    time.sleep(1.5)
    found = votes(settings)
    assert len(found) == n
    return found


def test_votes_are_cast_counted_changed_and_outlive_the_server(browser, settings):
    with served(settings) as (url, process):
        bob = Rater(browser, url, "bob 1234")  # keys that vote elsewhere are letters here
        assert votes(settings) == []
        bob.press("1", 2)
        bob.press("ArrowRight", 3)
        bob.click("tie", 4)
        assert [v[0] for v in settled(settings, 3)] == ["bob 1234"] * 3

        bob.page.dblclick("#arena-left")  # one vote, and none on the question that follows
        bob.at(5)
        settled(settings, 4)
        bob.page.keyboard.press("2")
        bob.page.keyboard.press("2")
        bob.at(6)
        settled(settings, 5)

        bob.page.go_back()  # the browser's own button
        bob.at(5)
        assert "You voted: right is better" in bob.text()
        before = votes(settings)
        bob.press("4", 6)
        after = settled(settings, 5)
        assert [v[2] for v in after] == [*(v[2] for v in before[:4]), "bad"]
        bob.click("back", 5)
        assert "You voted: both bad" in bob.text()
        bob.press("n", 6)
        bob.page.reload()
        bob.at(6)
        assert "5 of 8 answered" in bob.text() and votes(settings) == after

        assert bob.page.evaluate("window.pwned") is None
        assert "<script>window.pwned=1</script>" in bob.text()
        second = subprocess.run(
            [sys.executable, "-m", "qirl_fast.arena", str(settings), "port=0"],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert second.returncode == 2
        assert f"is served by process {process.pid} already" in second.stderr

    port = int(url.rstrip("/").rpartition(":")[2])
    with served(settings, port) as (url, _):
        bob.page.reload()
        bob.at(6)
        assert "5 of 8 answered" in bob.text() and votes(settings) == after
        for place in (7, 8, ""):
            bob.press("b", place)
        assert "all 8 questions are answered" in bob.text()
        bob.press("Backspace", 8)
        assert bob.foreign == []


def test_several_raters_results_and_a_small_screen(browser, settings):
    with served(settings) as (url, _):
        raters = [Rater(browser, url, name) for name in ("anna", "ben")]
        for place in range(1, PROMPTS + 1):
            then = place + 1 if place < PROMPTS else ""
            for rater in raters:
                # rl is the brighter one: whoever looks for that votes for it on either side
                rater.press(brighter(rater.page), then)
        found = settled(settings, 2 * PROMPTS)
        assert {v[2] for v in found} == {"b"}

        anna = raters[0].page
        anna.get_by_role("tab", name="Results").click()
        assert not anna.locator("#arena-results").count()  # only to who asks
        anna.click("#arena-ask")
        anna.wait_for_selector("#arena-results")
        said = anna.inner_text("#arena-results")
        assert "rl is preferred to base on 100.0 % of 8 prompts" in said
        assert re.search(r'The interval (excludes|does not exclude) "no difference" \(50 %\)', said)
        assert "Votes of 2 people: 16 for rl, 0 for base, 0 tied, 0 both bad" in said
        assert "none (only one label was ever given)" in said
        anna.keyboard.press("1")  # no vote from here
        settled(settings, 2 * PROMPTS)

        ben = raters[1]
        ben.page.click("#arena-leave")
        ben.page.wait_for_selector("#arena-hello")
        ben.page.fill("#arena-name :is(input, textarea)", "carl")
        ben.page.keyboard.press("Enter")
        ben.at(1)
        assert "carl, question 1; 0 of 8 answered" in ben.text()
        ben.press("3", 2)
        anna.wait_for_function(  # without a click: it follows the votes
            "document.querySelector('#arena-results').innerText.includes('1 tied')"
        )
        for page in (anna, ben.page):
            page.set_viewport_size({"width": 390, "height": 844})
            page.wait_for_timeout(500)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for place in range(2, PROMPTS + 1):  # the edits are among them
            assert widths(ben.page, "figure:not(.source)") == pytest.approx([184, 184], abs=25)
            assert all(100 < width < 200 for width in widths(ben.page, "figure.source"))
            ben.press("3", place + 1 if place < PROMPTS else "")
        assert all(rater.foreign == [] for rater in raters)


def widths(page, which: str) -> list[float]:
    """Of the pictures on the screen, in pixels."""
    found = page.evaluate(
        """(which) => [...document.querySelectorAll(`#arena-pair ${which} img`)].map(
          (i) => i.getBoundingClientRect().width)""",
        which,
    )
    return list(found)


def brighter(page) -> str:
    """The key for the side with the brighter picture, read off the pixels."""
    left, right = page.evaluate(
        """() => [...document.querySelectorAll("#arena-pair figure:not(.source) img")].map((i) => {
          const c = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
          const pen = c.getContext("2d");
          pen.drawImage(i, 0, 0, 1, 1);
          return pen.getImageData(0, 0, 1, 1).data[0];
        })"""
    )
    assert left != right
    return "1" if left > right else "2"
