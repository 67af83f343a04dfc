"""compare.html: several runs on what they have in common, and what it says of the rest."""

from __future__ import annotations

import json
import re
from pathlib import Path

import made_runs
import numpy as np
import pytest

from qirl_fast.compare import main
from qirl_fast.evaluation.paired import paired_bootstrap
from qirl_fast.reporting.common import against_first, common, differing
from qirl_fast.reporting.run import RunError, read_run
from qirl_fast.reporting.several import compared, seconds


def shown(*folders: Path) -> made_runs.Page:
    found = made_runs.Page(compared([read_run(folder) for folder in folders]))
    found.require_self_contained()
    return found


def test_two_runs_of_the_same_prompts(tmp_path: Path, capsys) -> None:
    one = made_runs.make(tmp_path / "one", prompts=12)
    two = made_runs.make(tmp_path / "two", prompts=12, lift=0.3, seed=7)
    assert main([str(one), str(two)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "compare.html")
    found = made_runs.Page((tmp_path / "compare.html").read_text(encoding="utf-8"))
    found.require_self_contained()
    assert "12 prompts in common" in found.text and "8 of 12 common prompts" in found.text
    assert found.text.count("+0.100") >= 2, "both judges, run two against run one"
    assert "seed 0 7" in found.text, "the only setting that differs"
    assert found.count("img") == 8 * 3, "before, one, two"
    for part in ("Judges, by update", "Judges, by seconds in updates", "images/s", "KL"):
        assert part in found.text, part
    assert "note" not in [a.get("class") for _, a in found.tags], "nothing to remark on"


def test_what_never_changed_is_a_line_and_no_flat_chart(tmp_path: Path) -> None:
    one, two = (made_runs.make(tmp_path / name) for name in ("one", "two"))
    rows = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    made_runs.write_rows(two / "metrics.jsonl", [row | {"clip_fraction": 0.2} for row in rows])
    text = compared([read_run(folder) for folder in (one, two)])
    lines = "<li>diversity of a prompt&#x27;s images (Delta E): 20</li><li>loss: 0</li></ul>"
    assert f"<b>The same in every update</b><ul>{lines}" in text
    assert 'aria-label="loss"' not in text and 'aria-label="KL"' in text
    assert 'aria-label="clip fraction"' in text, "flat, but not the same in both"


def test_the_page_goes_where_it_is_wanted(tmp_path: Path, capsys) -> None:
    folders = [made_runs.make(tmp_path / name) for name in ("one", "two", "three")]
    where = tmp_path / "pages" / "x.html"
    assert main([*map(str, folders), "--output", str(where)]) == 0
    assert where.is_file() and "three" in made_runs.Page(where.read_text()).text
    assert not (tmp_path / "compare.html").exists()


def test_prompts_are_matched_by_id_in_any_order(tmp_path: Path) -> None:
    """Run two has eight of run one's twelve, in another order, and four of its own."""
    ids = [f"{i:016x}" for i in range(12)]
    own = [*ids[9:1:-1], *(f"{i:016x}" for i in range(100, 104))]
    one = read_run(made_runs.make(tmp_path / "one", prompts=12, ids=ids))
    two = read_run(made_runs.make(tmp_path / "two", prompts=12, ids=own, lift=0.3))
    both = common([one, two])
    assert [ids[i] for i in both.prompts[0]] == [own[i] for i in both.prompts[1]] == ids[2:10]
    assert "Held-out prompts differ (one 12, two 12): compared on the 8 in common." in both.remarks
    assert one.after is not None and two.after is not None
    old, new = one.after.scores["alignment"], two.after.scores["alignment"]
    expected = paired_bootstrap(old[2:10], new[[own.index(i) for i in ids[2:10]]])
    assert against_first(both, "alignment", 1) == expected
    assert "8 prompts in common" in shown(one.folder, two.folder).text


def test_equal_prompts_are_matched_one_to_one(tmp_path: Path) -> None:
    ids = ["a" * 16] * 3 + ["b" * 16]
    one = made_runs.make(tmp_path / "one", prompts=4, ids=ids)
    two = made_runs.make(tmp_path / "two", prompts=3, ids=[ids[3], ids[0], ids[0]])
    both = common([read_run(one), read_run(two)])
    assert both.prompts == [[0, 1, 3], [1, 2, 0]]


def test_prompts_that_a_judge_could_not_judge_are_left_out_of_its_pairs(tmp_path: Path) -> None:
    runs = [made_runs.make(tmp_path / name, prompts=8) for name in ("one", "two")]
    path = runs[1] / "samples/after.npz"
    with np.load(path) as saved:
        arrays = dict(saved)
    arrays["score_alignment"][:3] = np.nan
    np.savez(path, **arrays)
    both = common([read_run(folder) for folder in runs])
    found = against_first(both, "alignment", 1)
    assert found is not None and found.n == 5


def test_nothing_in_common_is_said_and_left_out(tmp_path: Path) -> None:
    one = made_runs.make(tmp_path / "one")
    two = made_runs.make(
        tmp_path / "two",
        ids=[f"{i:016x}" for i in range(50, 56)],
        names=("edit_accuracy",),
        rewards={"edit_accuracy": 1.0},
        rollout={"height": 128, "width": 64, "guidance": 1.5},
        evaluation={"samples_per_prompt": 4, "steps": 6, "guidance": 1.5, "seed": 1},
        data={"train": "other.jsonl", "heldout": "other.jsonl"},
        model={"path": "models/big"},
    )
    found = shown(one, two)
    for part in (
        "Judges only in one: alignment, aesthetics; left out.",
        "Judges only in two: edit_accuracy; left out.",
        "no judge in common: no scores are compared",
        "no held-out prompt in common (one 6, two 6)",
        "Resolutions differ (one height=64, width=64; two height=128, width=64)",
        "Settings of held-out sampling differ",
        "Base models differ (one path=tiny; two path=models/big)",
        "Training prompts differ",
        "Judges' weights differ",
    ):
        assert part in found.text, part
    assert found.count("img") == 0 and "Nothing to compare: see above" in found.text


def test_a_judge_of_other_settings_is_another_judge(tmp_path: Path) -> None:
    kinds = [{"alignment": {"kind": "vlm", "path": path}} for path in ("a", "b")]
    one, two = (
        made_runs.make(tmp_path / name, judges=kind)
        for name, kind in zip(("one", "two"), kinds, strict=True)
    )
    both = common([read_run(one), read_run(two)])
    assert both.judges == ["aesthetics"]
    assert "Judge alignment has other settings in some runs" in " ".join(both.remarks)


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    one, two = (made_runs.make(tmp_path / name) for name in ("one", "two"))
    (two / "samples/after.npz").unlink()
    (two / "summary.json").unlink()
    lines = (two / "metrics.jsonl").read_text().splitlines(keepends=True)
    (two / "metrics.jsonl").write_text("".join(lines[:7]))
    found = shown(one, two)
    assert "two: This run stopped, or is still running, at update 7 of 40" in found.text
    assert "two: no held-out pictures of after training" in found.text
    assert "Judges, by update" in found.text and found.count("img") == 0


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    one, two = (made_runs.make(tmp_path / name / "run") for name in ("a", "b"))
    both = common([read_run(one), read_run(two), read_run(two)])
    assert both.labels[0] == f"run ({one})"
    assert len(set(both.labels)) == 3


def test_settings_that_differ(tmp_path: Path) -> None:
    one = made_runs.make(tmp_path / "one", train={"steps": 40, "lr": 1e-4}, judges={})
    two = made_runs.make(
        tmp_path / "two", train={"steps": 40, "lr": 2e-4}, extra={"a": {"b": True}}
    )
    runs = [read_run(one), read_run(two)]
    assert differing(runs) == {"train.lr": [1e-4, 2e-4], "extra.a.b": ["absent", True]}


def test_seconds_are_added_up_over_updates(tmp_path: Path) -> None:
    run = read_run(made_runs.make(tmp_path / "one", updates=4))
    assert seconds(run).tolist() == [1.5, 3.0, 4.5, 6.0]


def test_text_is_text(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>\"'& \0 \1"
    one, two = (
        made_runs.make(tmp_path / name, texts=[bad] * 6, seed=bad, run=f"<i>{name}</i>")
        for name in ("one", "two")
    )
    text = (two / "config.resolved.yaml").read_text()
    (two / "config.resolved.yaml").write_text(text.replace("alert(1)", "alert(2)"))
    found = shown(one, two)
    assert "<script>alert(1)</script>" in found.text and "<i>two</i>" in found.text
    assert "<script>alert(2)</script>" in found.text


def test_many_runs_of_large_pictures_stay_within_the_limit(tmp_path: Path) -> None:
    one = made_runs.make(tmp_path / "one", prompts=8, size=256, strips=())
    found = shown(*[one] * 8)
    assert found.count("img") == 8 * 9


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{one}"], "got 1 run; wanted two or more"),
        (["{one}", "{none}"], "got nothing that is there; wanted a run's folder"),
    ],
)
def test_what_cannot_be_compared(args: list[str], message: str, tmp_path: Path, capsys) -> None:
    one = made_runs.make(tmp_path / "one")
    paths = {"one": one, "none": tmp_path / "none"}
    assert main([arg.format(**paths) for arg in args]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.html"))
    with pytest.raises(RunError, match=re.escape("got 0 run")):
        compared([])


@pytest.mark.parametrize("args", [[], ["--what"], ["--help"], ["--output"]])
def test_how_it_is_called(args: list[str], capsys) -> None:
    assert main(args) == (0 if args == ["--help"] else 2)
    assert "python -m qirl_fast.compare RUN RUN" in capsys.readouterr().out
