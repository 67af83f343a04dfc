"""Makes build/docs, what mkdocs reads: the pages as they lie in the repository, and two more.

python .ci/site_pages.py; then mkdocs build --strict -f .ci/mkdocs.yml (make docs does both). Pages
keep their places, so links between them are those of the repository. Made here, not committed:
docs/config.md (settings_page.py) and the tables in docs/performance.md, which has a line
`<!-- results: KIND -->` where those of bench/results/KIND-*.md belong, `*` for all other kinds.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = ("*.md", "LICENSE", "docs/*.md", "docs/*.png", "examples/*", "examples/launch/*")
PAGES += ("bench/results/*.md", "bench/results/*.png")
_MARK = re.compile(r"^<!-- results: (\S+) -->$", re.M)


def kind_of(path: Path) -> str:
    """ops-cpu-epyc-avx512.json -> ops; step-edit-cpu-... -> step."""
    return path.stem.split("-")[0]


def number(value: Any) -> str:
    """A cell of a table made from a result that has none."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def table(result: Mapping[str, Any]) -> str:
    """The rows of a result file as Markdown, with what it was measured on."""
    machine = [f"{k} {v}" for part in ("machine", "settings") for k, v in result[part].items()]
    columns = list(result["rows"][0])
    lines = [f"Commit {result['commit'][:12]}, {result['date']}; {', '.join(machine)}.", ""]
    lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(number(row[c]) for c in columns) + " |" for row in result["rows"]]
    return "\n".join(lines) + "\n"


def measured() -> dict[str, str]:
    """Name of every result -> its table: the one that the benchmark wrote, else one of its rows."""
    found = {path.stem: path.read_text(encoding="utf-8") for path in RESULTS.glob("*.md")}
    for path in RESULTS.glob("*.json"):
        if path.stem not in found:
            found[path.stem] = table(json.loads(path.read_text(encoding="utf-8")))
    return dict(sorted(found.items()))


def with_results(text: str) -> str:
    """The page with every table of bench/results in its place, none left out."""
    tables = measured()
    kinds = _MARK.findall(text)

    def inserted(mark: re.Match[str]) -> str:
        chosen = [
            name
            for name in tables
            if (own := kind_of(Path(name))) == mark[1] or (mark[1] == "*" and own not in kinds)
        ]
        return "\n\n".join(section(name, tables[name]) for name in chosen)

    return _MARK.sub(inserted, text)


def section(name: str, body: str) -> str:
    """One result: its name, its table, its plot. Headings of the table come below the name."""
    plot = f"../bench/results/{name}.png"
    lines = [f"### {name}", "", re.sub(r"^(#+) ", r"###\1 ", body, flags=re.M).strip()]
    if (RESULTS / f"{name}.png").exists():
        lines += ["", f"[Plot]({plot})"]
    return "\n".join(lines) + "\n"


def stage(folder: Path) -> None:
    """Write the site's sources anew."""
    from settings_page import settings_page

    shutil.rmtree(folder, ignore_errors=True)
    for pattern in PAGES:
        for path in ROOT.glob(pattern):
            if path.is_file():
                place = folder / path.relative_to(ROOT)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)
    (folder / "docs" / "config.md").write_text(settings_page(), encoding="utf-8")
    page = folder / "docs" / "performance.md"
    page.write_text(with_results(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    stage(ROOT / "build" / "docs")
