"""docs/rewards.md and docs/judges.md: the examples run, the recipes' sections are valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from yaml import safe_load

from qirl_fast.rewards.edits import EditRule, check_rule
from qirl_fast.rewards.kinds import BUILDERS, JudgeSettings
from qirl_fast.rewards.tiers import Tier, check_tiers

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCKS = [
    (f"docs/{name}.md", language, body)
    for name in ("rewards", "judges")
    for language, body in re.findall(
        r"^```(\w+)\n(.*?)^```", (DOCS / f"{name}.md").read_text(), flags=re.DOTALL | re.M
    )
]
PYTHON = [(page, body) for page, language, body in BLOCKS if language == "python"]
# They need a trained judge and a server: tests/rewards/test_vlm_local.py, test_remote.py.
ELSEWHERE = ("import Settings, Vlm", "import Remote, Settings")


def test_what_is_not_run_here_is_known() -> None:
    skipped = [body for _, body in PYTHON if any(word in body for word in ELSEWHERE)]
    assert len(skipped) == len(ELSEWHERE) < len(PYTHON)


@pytest.mark.parametrize(("page", "body"), PYTHON)
def test_the_example_runs(page: str, body: str, tmp_path: Path, monkeypatch) -> None:
    if any(word in body for word in ELSEWHERE):
        body = body.partition("\njudge =")[0]  # what it imports is there
    if "import ocr" in body:
        pytest.importorskip("rapidocr", reason="extra 'ocr'")
    monkeypatch.chdir(tmp_path)
    exec(compile(body, page, "exec"), {})


def test_the_sections_shown_are_valid() -> None:
    settings = TypeAdapter(JudgeSettings)
    shown = [safe_load(body) for _, language, body in BLOCKS if language == "yaml"]
    kinds = set()
    for section in shown:
        for judge in section.get("judges", {}).values():
            kinds.add(settings.validate_python(judge).kind)
        if "edit" in section:
            check_rule(EditRule.model_validate(section["edit"]), list(section["rewards"]))
        check_tiers([Tier.model_validate(tier) for tier in section.get("tiers", [])])
    assert {"vlm", "openai", "remote", "ocr", "pickscore"} <= kinds


def test_every_kind_is_in_the_table() -> None:
    table = "\n".join(
        line for line in (DOCS / "rewards.md").read_text().splitlines() if line.startswith("| `")
    )
    assert [kind for kind in BUILDERS if f"`{kind}`" not in table] == []
