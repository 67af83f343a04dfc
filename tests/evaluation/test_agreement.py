"""The files of a validation: their numbers, their intervals, and what is said where one lacks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from qirl_fast.evaluation import Judged, write_validation

CATEGORIES = ("colour", "count", None)


def make_items(prompts: int = 24, per: int = 4, seed: int = 0) -> list[Judged]:
    generator = np.random.default_rng(seed)
    items = []
    for dimension in ("alignment", "aesthetics"):
        for prompt in range(prompts):
            for _ in range(per):
                truth = float(np.round(generator.uniform(1, 5) * 3) / 3)
                scores = np.clip(truth + generator.normal(size=4) * 0.8, 1, 5)
                probs = generator.dirichlet(np.ones(5))
                item = Judged(
                    truth=truth,
                    predicted=float(scores[0]),
                    dimension=dimension,
                    category=CATEGORIES[prompt % 3],
                    cluster=f"prompt {prompt}",
                    repeats=tuple(scores[1:].tolist()),
                    probs=tuple(probs.tolist()),
                )
                items.append(item)
    return items


ITEM = Judged(3.0, 3.5, "alignment", None, "p")


def validate(items: list[Judged], folder: Path, n_boot: int = 200) -> dict[str, Any]:
    return write_validation(items, folder, n_boot=n_boot)


def statistics(tree: Any) -> list[dict[str, Any]]:
    """All statistics anywhere in a tree."""
    if isinstance(tree, list):
        return [found for part in tree for found in statistics(part)]
    if not isinstance(tree, dict):
        return []
    own = [tree] if "value" in tree else []
    return own + [found for part in tree.values() for found in statistics(part)]


def test_numbers_are_those_of_scipy_and_stand_within_their_intervals(tmp_path: Path) -> None:
    items = make_items()
    tree = validate(items, tmp_path / "new" / "folder")
    assert (tree["n"], tree["n_boot"], tree["seed"], tree["level"]) == (192, 200, 0, 0.95)
    group = tree["dimensions"]["alignment"]
    assert (group["n"], group["clusters"], group["without_category"]) == (96, 24, 32)
    mine = [item for item in items if item.dimension == "alignment"]
    x, y = [item.truth for item in mine], [item.predicted for item in mine]
    wanted = {
        "pearson": stats.pearsonr(x, y).statistic,
        "spearman": stats.spearmanr(x, y).statistic,
        "kendall": stats.kendalltau(x, y).statistic,
        "pairwise_accuracy": (1 + stats.somersd(x, y).statistic) / 2,
        "mean_error": np.mean(y) - np.mean(x),
        "rmse": np.sqrt(np.mean((np.array(y) - x) ** 2)),
    }
    for name, value in wanted.items():
        assert group[name]["value"] == pytest.approx(value, abs=1e-12), name
    count = group["categories"]["count"]
    x, y = ([getattr(i, n) for i in mine if i.category == "count"] for n in ("truth", "predicted"))
    assert count["spearman"]["value"] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert set(group["categories"]) == {"colour", "count"}
    found = statistics(tree)
    assert len(found) == 14 * (1 + 2 * 3)
    for each in found:
        assert each["low"] <= each["value"] <= each["high"], each
        assert each["undefined"] == 0
    for each in group["calibration"]:
        assert each["low"] < each["truth"] < each["high"]
    assert sum(each["n"] for each in group["calibration"]) == 96


def test_overall_is_the_mean_over_dimensions(tmp_path: Path) -> None:
    """A judge right within dimensions is not marked down, nor one wrong up, by their levels."""
    items = make_items()
    items = [
        replace(i, truth=1 + i.truth / 5, predicted=2 - i.predicted / 5)
        if i.dimension == "alignment"
        else replace(i, truth=4 + i.truth / 5, predicted=5 - i.predicted / 5)
        for i in items
    ]
    tree = validate(items, tmp_path)
    parts = [tree["dimensions"][d]["pearson"]["value"] for d in ("alignment", "aesthetics")]
    assert tree["overall"]["pearson"]["value"] == pytest.approx(np.mean(parts))
    assert tree["overall"]["pearson"]["high"] < 0
    assert tree["overall"]["clusters"] == 24


def test_only_what_a_group_holds_decides_its_numbers(tmp_path: Path) -> None:
    items = make_items()
    tree = validate(items, tmp_path / "a")
    shuffled = [items[i] for i in np.random.default_rng(0).permutation(len(items))]
    assert validate(shuffled, tmp_path / "b") == tree
    for name in ("validation.json", "validation.md", "validation.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    alone = validate([i for i in items if i.dimension == "alignment"], tmp_path / "c")
    assert alone["dimensions"]["alignment"] == tree["dimensions"]["alignment"]
    other = write_validation(items, tmp_path / "d", n_boot=200, seed=1)
    first, second = (t["dimensions"]["alignment"]["spearman"] for t in (tree, other))
    assert first["value"] == second["value"]
    assert first["low"] != second["low"]


def test_images_of_a_prompt_are_not_independent(tmp_path: Path) -> None:
    """Each row four times under its prompt tells no more than once: the interval stays."""
    once = [i for i in make_items(40, 1) if i.dimension == "alignment"]
    intervals = []
    for name, items in (("once", once), ("copied", once * 4)):
        found = validate(items, tmp_path / name)["dimensions"]["alignment"]["spearman"]
        intervals.append([found["value"], found["low"], found["high"]])
    assert intervals[0] == pytest.approx(intervals[1])


def test_files_hold_the_tree(tmp_path: Path) -> None:
    items = make_items()
    hostile = "| $x^ \\frac{$ \n <b> " + "long " * 40
    items += [replace(i, dimension=hostile, category=hostile) for i in items[:40]]
    tree = validate(items, tmp_path)
    text = (tmp_path / "validation.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == tree
    lines = (tmp_path / "validation.md").read_text(encoding="utf-8").splitlines()
    wanted = tree["dimensions"]["alignment"]["spearman"]
    row = next(line for line in lines if line.startswith("| alignment |"))
    assert f"| {wanted['value']:.3f} [{wanted['low']:.3f}, {wanted['high']:.3f}] |" in row
    head = next(line for line in lines if line.startswith("| rows of"))
    for line in lines[lines.index(head) :]:
        if not line:
            break
        assert line.replace("\\|", "").count("|") == head.count("|"), line
    with Image.open(tmp_path / "validation.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape[0] > 1000
    assert (pixels < 128).mean() > 0.005
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["validation.json", "validation.md", "validation.png"]


def test_any_number_of_categories_fits_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qirl_fast.evaluation.agreement_report.MAX_PIXELS", 500)
    long = "the same beginning of a long name of a category, number"
    items = [replace(i, category=f"{long} {i.cluster}") for i in make_items(40, 1)]
    tree = validate(items, tmp_path, 100)
    assert len(tree["dimensions"]["alignment"]["categories"]) == 40
    with Image.open(tmp_path / "validation.png") as picture:
        assert 490 <= picture.height <= 500


def test_top_label_calibration_by_hand(tmp_path: Path) -> None:
    """Sure of 4 at 0.8; right for truths 4 and 3.6, half right for 3.5, wrong for 2: 5 each."""
    probs = (0.05, 0.05, 0.05, 0.8, 0.05)
    truths = (4.0, 3.6, 3.5, 2.0) * 5
    items = [replace(ITEM, truth=t, cluster=f"p{k}", probs=probs) for k, t in enumerate(truths)]
    found = validate([*items, ITEM], tmp_path)["dimensions"]["alignment"]["top_label"]
    assert found["n"] == 20
    assert found["ece"]["value"] == pytest.approx(0.8 - 0.625)
    assert found["overconfidence"]["value"] == pytest.approx(0.8 - 0.625)
    (only,) = found["calibration"]  # 20 rows make two bins, but equal values share one
    assert (only["n"], only["predicted"], only["truth"]) == (20, pytest.approx(0.8), 0.625)


def test_a_calibrated_judge_may_have_no_calibration_error(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    items = []
    for k, predicted in enumerate(generator.uniform(2, 4, 300)):
        truth = float(predicted + generator.uniform(-1, 1))
        items.append(replace(ITEM, truth=truth, predicted=float(predicted), cluster=f"p{k}"))
    fair = validate(items, tmp_path)["dimensions"]["alignment"]["ece"]
    assert fair["low"] == 0
    assert fair["by_chance"] == pytest.approx(fair["value"], rel=0.6)
    kind = [replace(i, predicted=i.predicted + 0.5) for i in items]
    off = validate(kind, tmp_path)["dimensions"]["alignment"]["ece"]
    assert 0.3 < off["low"] < 0.5 < off["high"] < 0.7


@pytest.mark.parametrize(
    ("truths", "predictions", "name", "reason"),
    [
        ((1, 2), (1, 2), "spearman", "3 rows are needed, got 2"),
        ((1,), (1,), "rmse", "3 rows are needed, got 1"),
        ((2, 2, 2, 2), (1, 2, 3, 4), "pearson", "every truth is 2"),
        ((2, 2, 2, 2), (1, 2, 3, 4), "pairwise_accuracy", "no two rows have different truths"),
        ((1, 2, 3, 4), (2, 2, 2, 2), "kendall", "every prediction is 2"),
        ((2, 2, 2, 2), (3, 3, 3, 3), "spearman", "every truth is 2 and every prediction is 3"),
        (
            (1, 2, 3, 4),
            (1, 2, 3, 4),
            "pairwise_accuracy_within_prompt",
            "no prompt has two rows of different truth",
        ),
    ],
)
def test_undefined_is_null_with_its_reason(
    truths: tuple[float, ...],
    predictions: tuple[float, ...],
    name: str,
    reason: str,
    tmp_path: Path,
) -> None:
    items = [
        replace(ITEM, truth=x, predicted=y, cluster=f"p{k}")
        for k, (x, y) in enumerate(zip(truths, predictions, strict=True))
    ]
    tree = validate(items, tmp_path)
    found = tree["dimensions"]["alignment"][name]
    assert (found["value"], found["low"], found["high"]) == (None, None, None)
    assert found["reason"] == reason
    assert reason in (tmp_path / "validation.md").read_text(encoding="utf-8")
    assert tree["overall"][name]["reason"] == "undefined in dimension alignment"


def test_repeats_that_are_not_there_are_said(tmp_path: Path) -> None:
    items = [replace(i, repeats=i.repeats[:1], probs=None) for i in make_items()]
    group = validate(items, tmp_path)["dimensions"]["alignment"]
    assert group["repeats"]["n"] == 0
    assert group["repeats"]["icc"]["reason"] == "3 rows judged twice or more are needed, got 0"
    assert group["top_label"]["ece"]["reason"] == "3 rows with probs are needed, got 0"
    equal = [replace(i, repeats=(2.0, 2.0)) for i in items]
    found = validate(equal, tmp_path)["dimensions"]["alignment"]["repeats"]
    assert found["within_sd"]["value"] == 0
    assert found["icc"]["reason"] == "all judgements of all rows are equal"
    assert found["flips"]["reason"] == "no judgement puts two rows in an order"


def test_one_prompt_has_no_interval(tmp_path: Path) -> None:
    items = [replace(i, cluster="p") for i in make_items() if i.dimension == "alignment"]
    group = validate(items, tmp_path)["dimensions"]["alignment"]
    for found in statistics(group):
        assert found["value"] is not None
        assert found["low"] is None
        assert found["reason"] == "all rows are of one prompt: there is nothing to resample"


def test_undefined_resamples_are_counted_and_many_leave_no_interval(tmp_path: Path) -> None:
    """Of k prompts of one row each a resample draws but one with probability k^(1 - k)."""
    few = [replace(ITEM, truth=t, predicted=t, cluster=str(t)) for t in (1.0, 2.0, 3.0)]
    found = validate(few, tmp_path, 1000)["dimensions"]["alignment"]["kendall"]
    assert found["value"] == 1
    assert found["low"] is None
    assert 1000 / 9 - 40 <= found["undefined"] <= 1000 / 9 + 40  # standard deviation 10
    assert f"undefined on {found['undefined']} of 1000 resamples" in found["reason"]
    more = [*few, replace(ITEM, truth=4.0, predicted=4.0, cluster="4")]
    found = validate(more, tmp_path, 1000)["dimensions"]["alignment"]["kendall"]
    assert 1 <= found["undefined"] <= 36  # 15.6 expected, standard deviation 4
    assert found["low"] == pytest.approx(1) == found["high"]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"truth": float("nan")}, r"item 1 \(dimension 'alignment'\): truth is nan; wanted"),
        ({"truth": 0.99}, r"truth is 0.99; wanted a finite score in \[1, 5\]"),
        ({"predicted": 5.01}, "predicted is 5.01"),
        ({"predicted": float("inf")}, "predicted is inf"),
        ({"repeats": (3.0, float("nan"))}, r"repeats\[1\] is nan"),
        ({"dimension": ""}, "dimension is ''"),
        ({"cluster": ""}, "cluster is ''"),
        ({"category": ""}, "category is ''"),
        ({"probs": (0.5, 0.5)}, "wanted 5 probabilities"),
        ({"probs": (float("nan"), 0.25, 0.25, 0.25, 0.25)}, "wanted 5 probabilities"),
        ({"probs": (-0.5, 0.5, 0.5, 0.5, 0.0)}, "wanted 5 probabilities"),
        ({"probs": (0.1, 0.1, 0.1, 0.1, 0.1)}, "probs sum to 0.5; wanted 1"),
    ],
)
def test_bad_items(change: dict[str, Any], part: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=part):
        write_validation([ITEM, replace(ITEM, **change)], tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_bad_calls(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got no judged items"):
        write_validation([], tmp_path)
    with pytest.raises(ValueError, match="got n_boot 99"):
        write_validation([ITEM], tmp_path, n_boot=99)
    with pytest.raises(ValueError, match="seed -1"):
        write_validation([ITEM], tmp_path, seed=-1)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        write_validation([ITEM], file)
