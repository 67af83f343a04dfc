"""Every command in the pages is run: here in a small form, or by a test that
docs_commands.yaml names.

A command is a line of a bash block, or code between single backticks that starts as one does. One
that the table does not know fails the first test. docs/LOG.md tells of commands that were run, and
is left out.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from yaml import dump, safe_load

from qirl_fast.config import load_settings
from qirl_fast.config.arena import ArenaConfig
from qirl_fast.config.evaluate import EvaluateConfig
from qirl_fast.tiny import packaged

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
PAGES += [page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "LOG.md"]
TUTORIAL = ROOT / "docs" / "own-model-and-reward.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"`((?:python -m|pip install|make|pytest|bash|torchrun|\.venv/bin/\S+) [^`]+)`")

KNOWN = safe_load((ROOT / "tests" / "docs_commands.yaml").read_text(encoding="utf-8"))
SMALL, RUN, COVERED, PYTHON = (KNOWN[name] for name in ("small", "run", "covered", "python"))


def words(line: str) -> list[str]:
    """A line's words, the program without its folder, no comment."""
    return [word.removeprefix(".venv/bin/") for word in shlex.split(line, comments=True)]


def lines_of(block: str) -> list[list[str]]:
    """The commands of a bash block."""
    return [found for line in block.replace("\\\n", " ").splitlines() if (found := words(line))]


def commands(page: Path) -> list[list[str]]:
    """Every command of a page, those of blocks first."""
    text = page.read_text(encoding="utf-8")
    blocks = [body for language, body in BLOCK.findall(text) if language == "bash"]
    found = [command for body in blocks for command in lines_of(body)]
    return found + [words(code) for code in INLINE.findall(BLOCK.sub("", text))]


def known(command: list[str], table: dict[str, str]) -> str | None:
    """What a table says of a command."""
    text = " ".join(command)
    return next((said for pattern, said in table.items() if re.fullmatch(pattern, text)), None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_run_by_a_test(page: Path) -> None:
    unknown = [c for c in commands(page) if known(c, RUN) is None and known(c, COVERED) is None]
    assert not unknown, f"name the test that runs them: {unknown}"


def test_the_tables_name_tests_that_are_there() -> None:
    runs = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(f"make {stage}" in runs for stage in ("setup", "test", "lint", "docs"))
    for said in {*COVERED.values(), *PYTHON.values()} - {".ci/run"}:
        file, _, test = said.partition("::")
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"def {test}" in source if test else "def test_" in source, said
    every = [" ".join(c) for page in PAGES for c in commands(page)]
    unused = [p for p in {**RUN, **COVERED} if not any(re.fullmatch(p, c) for c in every)]
    assert not unused, f"no page has these: {unused}"


def test_every_page_with_python_has_a_test_that_runs_it() -> None:
    have = {
        page.relative_to(ROOT).as_posix()
        for page in PAGES
        if any(language == "python" for language, _ in BLOCK.findall(page.read_text("utf-8")))
    }
    assert have == set(PYTHON)


def test_extras_named_in_the_pages_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"])
    named = {
        extra
        for page in PAGES
        for found in re.findall(r"(?:qirl[-_]fast\S*?|\.)\[([\w,-]+)\]'", page.read_text("utf-8"))
        for extra in found.split(",")
    }
    assert {"rewards", "dali", "ocr"} <= named <= extras
    asked = {"fp8", "dali", "flash", "xformers", "rewards", "arena", "dev"}
    assert asked <= extras


@pytest.mark.parametrize(
    ("page", "model"), [("evaluation", EvaluateConfig), ("arena", ArenaConfig)]
)
def test_settings_shown_are_valid(page: str, model: type[Any], tmp_path: Path) -> None:
    """Whole, or a further part of the first block of the page."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    shown = [safe_load(body) for language, body in BLOCK.findall(text) if language == "yaml"]
    assert len(shown) == 2
    for own in shown:
        (tmp_path / "x.yaml").write_text(dump(shown[0] | own if page == "arena" else own))
        load_settings([str(tmp_path / "x.yaml")], model)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder as the pages have it: the README's recipe, judge, model and prompts; the configs."""
    for language, body in BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8")):
        if language in ("python", "yaml") and body.startswith("# my_"):
            (tmp_path / body.split()[1]).write_text(body, encoding="utf-8")
    for name in ("configs", "qirl_fast"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").symlink_to(packaged("tiny"))
    (tmp_path / "prompts").mkdir()
    for name in ("train", "heldout"):
        rows = packaged(f"tiny:{name}").read_text(encoding="utf-8").splitlines()[:6]
        (tmp_path / "prompts" / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


def run(command: list[str], more: str, place: Path, start: Callable[..., Any]) -> None:
    """Run a command of the package in `place`, forked from a process that has imported torch."""
    python, _, module, *argv = command
    assert python == "python"
    hook = f"os.chdir({str(place)!r})\nfrom {module} import main"
    argv += more.replace("SMALL", SMALL).split()
    done = start(argv, paths=[place], hook=hook)
    status = done.wait(500)
    # A machine of tests may lack what the doctor asks for: then it says so, with status 1.
    assert status == 0 or (module.endswith("doctor") and status == 1), done.output()


HERE = ["README.md", "docs/algorithms.md", "docs/fp8.md", "docs/reliability.md", "docs/rewards.md"]


@pytest.mark.slow
@pytest.mark.parametrize("page", HERE)
def test_the_commands_of_a_page_run(page: str, place: Path, start: Callable[..., Any]) -> None:
    done = 0
    for command in commands(ROOT / page):
        more = known(command, RUN)
        if more is not None:
            run(command, more, place, start)
            done += 1
    assert done


@pytest.mark.slow
def test_the_tutorial_runs_from_top_to_bottom(
    tmp_path: Path, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own model, prompts, judge and recipe: nothing comes from elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for language, body in BLOCK.findall(TUTORIAL.read_text(encoding="utf-8")):
        if body.startswith("# ") and language in ("python", "yaml"):
            (tmp_path / body.split()[1]).write_text(body, encoding="utf-8")
        elif language == "python":
            exec(compile(body, TUTORIAL.name, "exec"), {})
        elif language == "bash":
            for command in lines_of(body):
                run(command, known(command, RUN) or "", tmp_path, start)
    lines = (tmp_path / "outputs" / "warm" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all('"pre_update_ratio_error": 0.0' in line for line in lines)
    assert (tmp_path / "models" / "warm" / "model_index.json").is_file()


def test_condition_images_as_the_models_page_has_them(frozen_model) -> None:
    (body,) = [
        b
        for language, b in BLOCK.findall((ROOT / "docs/models.md").read_text())
        if language == "python"
    ]
    height = width = 64
    ((h, w), *_) = frozen_model.condition_sizes((height, width), height * width)
    names: dict[str, Any] = {"model": frozen_model, "height": height, "width": width}
    names |= {"pixels": height * width, "versions": [np.zeros((h, w, 3), np.uint8)], "owner": [0]}
    exec(compile(body, "docs/models.md", "exec"), names)
    assert len(names["sizes"]) == len(names["versions"])
