"""The site's made pages: every settings key, every measured table, and no page left out of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from yaml import safe_load

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md", "docs/config.md"]
PAGES += [f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))]


def test_the_settings_page_has_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    from settings_page import all_sections, roots, settings_page

    page = settings_page()
    shown = {tuple(re.findall(r"^\| `(\w+)` \|", part, re.M)) for part in page.split("\n## ")}
    rows = {name for part in shown for name in part}
    keys = {key for s in all_sections() for key in s.model_fields if not s.__subclasses__()}
    assert rows >= keys and len(roots()) >= 5
    links, ids = (set(re.findall(p, page)) for p in (r"\]\(#([\w-]+)\)", r"\{#([\w-]+)\}"))
    assert links <= ids and len(re.findall(r"\{#", page)) == len(ids)


def test_the_performance_page_has_every_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    from site_pages import measured, with_results

    page = with_results((ROOT / "docs" / "performance.md").read_text(encoding="utf-8"))
    results = {path.stem for path in (ROOT / "bench" / "results").glob("*.json")}
    assert results <= set(measured())
    for name, body in measured().items():
        assert page.count(f"### {name}\n") == 1
        assert all(line in page for line in body.splitlines() if line.startswith("|"))
    assert "<!--" not in page


def test_the_site_leaves_no_page_out() -> None:
    site = safe_load((ROOT / ".ci" / "mkdocs.yml").read_text(encoding="utf-8"))
    named = re.findall(r"[\w./-]+\.md", str(site["nav"]))
    assert sorted(named) == sorted(PAGES)
