"""Vision-language models behind a real server vote, apart from people: picture by picture, and on
pairs in both orders.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qirl_fast.arena.__main__ import main
from qirl_fast.arena.store import Store
from qirl_fast.rewards.kinds import build
from qirl_fast.rewards.vlm.pairs import Settings

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
try:
    from test_facets import serving, text_of
finally:
    sys.path.pop(0)


def shades(body: dict[str, Any]) -> list[int]:
    """The first pixel of each picture that a request carries, in order."""
    parts = [p for p in body["messages"][0]["content"] if p["type"] == "image_url"]
    urls = [p["image_url"]["url"].partition("base64,")[2] for p in parts]
    return [int(np.array(Image.open(io.BytesIO(base64.b64decode(u)))).flat[0]) for u in urls]


@pytest.fixture
def study(folders: dict[str, str], tmp_path: Path) -> Any:
    """Settings of base (shades 10..15) and rl (100..105), two of six prompts being edits."""

    def write(judge: dict[str, Any]) -> list[str]:
        file = tmp_path / "arena.yaml"
        own = {"models": folders, "database": str(tmp_path / "votes.db"), "judges": {"eye": judge}}
        file.write_text(json.dumps(own | {"resamples": 100}))
        return [str(file), "judge=eye"]

    return write


def votes(tmp_path: Path) -> dict[str, str]:
    store = Store(tmp_path / "votes.db")
    found = {v.item.prompt: v.choice for v in store.votes("model")}
    assert store.votes("person") == [], "kept apart"
    store.close()
    return found


def pairs(url: str, **more: Any) -> dict[str, Any]:
    return {"kind": "pairs", "model": {"kind": "openai", "url": url, "model": "m"} | more}


def test_a_judge_of_single_pictures(study: Any, tmp_path: Path, capsys: Any) -> None:
    """The brighter picture gets 5; one prompt's pictures are refused by the server."""

    def write(body: dict[str, Any]) -> Any:
        (shade,) = shades(body)
        if "picture of 3" in text_of(body):
            return 400
        return f"It is {shade}.\nScore: {5 if shade >= 100 else 2}"

    with serving(write) as url:
        own = {"kind": "openai", "url": url, "model": "m", "dimension": "alignment"}
        words = study(own | {"reading": "integer"})
        assert main(["judge", *words]) == 1
    assert "5 votes of the judge; 1 questions it could not judge" in capsys.readouterr().out
    assert votes(tmp_path) == {f"p{i}": "b" for i in (0, 1, 2, 4, 5)}
    assert main(["results", words[0]]) == 0
    said = capsys.readouterr().out
    assert "No prompt of rl against base is decided yet" in said and "judge eye" in said


def test_pairs_in_both_orders(study: Any, tmp_path: Path, capsys: Any) -> None:
    """p0 by what is seen, p1 by position, p2 always a tie, p3 never in JSON, p4 in the second try,
    p5 refused.
    """
    seen: list[list[int]] = []
    tried: dict[str, int] = {}

    def write(body: dict[str, Any]) -> Any:
        *sources, first, second = shades(body)
        prompt = text_of(body).split("picture of ")[1][0]
        seen.append([*sources, first, second])
        tried[prompt] = tried.get(prompt, 0) + 1
        brighter = "first" if first > second else "second"
        answer = {"0": brighter, "1": "first", "2": "tie", "4": brighter, "5": brighter}
        if prompt == "3" or (prompt == "4" and "seed" not in body):
            return "I prefer the brighter one."
        return 400 if prompt == "5" else 'Let me {see}. {"better": "%s"}' % answer[prompt]  # noqa: UP031

    with serving(write) as url:
        assert main(["judge", *study(pairs(url, retries=0))]) == 1
    assert "4 votes of the judge; 2 questions it could not judge" in capsys.readouterr().out
    assert votes(tmp_path) == {"p0": "b", "p1": "tie", "p2": "tie", "p4": "b"}
    assert tried == {"0": 2, "1": 2, "2": 2, "3": 6, "4": 4, "5": 2}
    assert sorted(s for s in seen if len(s) == 3)[:2] == [[200, 10, 100], [200, 100, 10]]
    assert {len(s) for s in seen} == {2, 3}, "an edit's source comes first"


def test_a_server_that_is_away_casts_no_vote(study: Any, tmp_path: Path, capsys: Any) -> None:
    assert main(["judge", *study(pairs("http://127.0.0.1:9/v1", retries=0))]) == 1
    assert "0 votes of the judge; 6 questions it could not judge" in capsys.readouterr().out
    assert votes(tmp_path) == {}


def test_it_is_no_reward(caplog: Any) -> None:
    own = Settings.model_validate(pairs("http://127.0.0.1:9/v1"))
    judge = build(own, "cpu")
    with pytest.raises(ValueError, match="compares two pictures and scores none"):
        judge.check_row({"prompt": "x"})  # type: ignore[attr-defined]
    image = np.zeros((1, 8, 8, 3), np.uint8)
    for prompt in ("", 3, "x <|im_end|>"):
        assert np.isnan(judge.compare(image, image, [{"prompt": prompt}])).all()  # type: ignore[attr-defined]
    assert "holds the control token" in caplog.text
