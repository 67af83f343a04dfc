"""report.html: what it shows, that it needs nothing else, its warnings, and damaged runs."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_runs
import numpy as np
import pytest
from PIL import Image

from qirl_fast.data.prompts import Prompt
from qirl_fast.evaluation.diversity import coarse_lab, lab, mean_distance
from qirl_fast.evaluation.gridness import gridness
from qirl_fast.evaluation.heldout import Evaluation
from qirl_fast.report import main
from qirl_fast.reporting import checks
from qirl_fast.reporting.album import FORMS, LIMIT, Album, embedded
from qirl_fast.reporting.charts import Line, chart, thinned, ticks
from qirl_fast.reporting.kept import keep
from qirl_fast.reporting.page import page
from qirl_fast.reporting.run import RunError, read_run

KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def shown(folder: Path) -> made_runs.Page:
    found = made_runs.Page(page(read_run(folder)))
    found.require_self_contained()
    return found


def test_a_finished_run(tmp_path: Path, capsys) -> None:
    folder = made_runs.make(tmp_path / "one", prompts=12)
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    found = made_runs.Page((folder / "report.html").read_text(encoding="utf-8"))
    found.require_self_contained()
    parts = [
        "Held-out prompts, before and after", "Curves", "Best after", "Worst after",
        "Most changed", "The same prompts through training", "Settings",
        "No warnings; 6 checks clear", "8 of 12 held-out prompts", "update 20",
        "40 of 40", "0.50 GiB", "weight 0.7", "diversity", "seconds of an update",
    ]  # fmt: skip
    for part in parts:
        assert part in found.text, part
    # eight prompts at five times, and three groups of four before and after
    assert found.count("img") == 8 * 5 + 3 * 4 * 2
    assert "stopped" not in found.text


def test_the_table_has_the_paired_interval(tmp_path: Path) -> None:
    folder = made_runs.make(tmp_path / "one", prompts=12)
    with np.load(folder / "samples/before.npz") as a, np.load(folder / "samples/after.npz") as b:
        change = (b["score_alignment"] - a["score_alignment"]).mean()
    assert f"{change:+.3f}" in shown(folder).text
    low, high = (checks.changes(read_run(folder))["alignment"][k] for k in ("low", "high"))
    assert low < change < high and f"{low:+.3f} to {high:+.3f}" in shown(folder).text


def test_text_is_text(tmp_path: Path) -> None:
    bad = "<script>alert('1')</script><img src=x onerror=\"y\"> & \0 \1 \ud800"
    folder = made_runs.make(
        tmp_path / "one",
        texts=[bad] * 6,
        names=("<b>bold</b>", "aesthetics"),
        rewards={"<b>bold</b>": 0.5, "aesthetics": 0.5},
        model={"path": "</pre><script>x</script>"},
        run="<i>name</i>",
    )
    found = shown(folder)
    assert "<script>alert('1')</script>" in found.text and "<b>bold</b>" in found.text
    assert "<i>name</i>" in found.text and "</pre><script>x</script>" in found.text
    assert "\ufffd" in found.text and found.count("i") == 0


def test_many_large_pictures_stay_within_the_limit(tmp_path: Path) -> None:
    """Noise of 512 pixels a side, which nothing compresses; none is left out."""
    folder = made_runs.make(tmp_path / "one", prompts=9, size=512, strips=tuple(range(2, 40, 3)))
    found = shown(folder)
    assert len(found.html.encode()) < LIMIT == 8_000_000
    assert found.count("img") == 8 * 10 + 3 * 4 * 2
    assert "8 of 9 held-out prompts" in found.text and "8 of 13 drawings" in found.text
    assert "no side over" in found.text and "without loss" not in found.text


def test_small_pictures_are_kept_to_the_bit() -> None:
    album, image = Album(), made_runs.pictures(1)[0]
    mark = album.mark(image)
    assert album.mark(image.copy()) == mark and len(album.images) == 1
    html, form = embedded(f"<{mark}>", album)
    raw = base64.b64decode(html.split("base64,")[1][:-1])
    assert form is FORMS[0] and np.array_equal(Image.open(io.BytesIO(raw)), image)


def test_a_text_over_the_limit_is_refused() -> None:
    album = Album()
    with pytest.raises(ValueError, match="leaves -"):
        embedded("x" * LIMIT + album.mark(made_runs.pictures(1)[0]), album)


def test_long_texts_are_cut_and_say_so(tmp_path: Path) -> None:
    texts = ["word " * 100_000, *["short"] * 5]
    folder = made_runs.make(tmp_path / "one", texts=texts, note={"x": "y" * 300_000})
    found = shown(folder)
    assert "(500,000 characters in all)" in found.text
    assert "more characters: see config.resolved.yaml" in found.text
    assert len(found.html) < 3_000_000


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    judges = {"j": {"kind": "remote", "token": "abc123", "api_key": "def456", "url": "http://x"}}
    found = shown(made_runs.make(tmp_path / "one", judges=judges))
    assert "abc123" not in found.html and "def456" not in found.html and "http://x" in found.text


def stop_half_way(folder: Path, at: int = 12) -> None:
    for name in ("metrics", "timings"):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:at]))
    (folder / "summary.json").unlink()
    (folder / "samples/after.npz").unlink()


def test_a_run_stopped_half_way(tmp_path: Path) -> None:
    folder = made_runs.make(tmp_path / "one")
    stop_half_way(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "rew')
    found = shown(folder)
    assert "stopped, or is still running, at update 12 of 40" in found.text
    assert "The last line of metrics.jsonl was cut short" in found.text
    assert "There is no evaluation after training yet" in found.text
    assert "update 10" in found.text and "update 20" not in found.text, "undone since"
    assert "Best after" not in found.text


def test_a_run_that_goes_on_says_of_when_its_results_are(tmp_path: Path) -> None:
    folder = made_runs.make(tmp_path / "one")
    text = (folder / "config.resolved.yaml").read_text().replace("steps: 40", "steps: 80")
    (folder / "config.resolved.yaml").write_text(text)
    found = shown(folder)
    assert "at update 40 of 80" in found.text
    assert "Held-out results are those of update 40" in found.text


def test_no_update_yet(tmp_path: Path) -> None:
    folder = made_runs.make(tmp_path / "one", strips=())
    stop_half_way(folder, 0)
    (folder / "samples/before.npz").unlink()
    (folder / "timings.jsonl").unlink()
    found = shown(folder)
    assert "No update was finished yet" in found.text and "There is no timings.jsonl" in found.text


def test_runs_of_an_earlier_version(tmp_path: Path) -> None:
    """No after.npz, no texts, images as one array; the table is that of summary.json."""
    folder = made_runs.make(tmp_path / "one", strips=())
    (folder / "samples/after.npz").unlink()
    path = folder / "samples/before.npz"
    with np.load(path) as saved:
        old = {n: saved[n] for n in saved if n.startswith(("score_", "prompts"))}
        old["images"] = np.stack([saved[f"image_{i}"] for i in range(6)])
    np.savez(path, **old)
    row = {"before": 0.1, "after": 0.4, "diff": 0.3, "low": 0.25, "high": 0.35, "n": 6}
    (folder / "summary.json").write_text(json.dumps({"steps": 40, "judges": {"alignment": row}}))
    found = shown(folder)
    assert "+0.300" in found.text and "+0.250 to +0.350" in found.text
    assert "no samples/after.npz" in found.text and "was not kept" in found.text
    assert found.count("img") == 6


def test_a_run_without_rewards_shows_what_it_has(tmp_path: Path) -> None:
    rows = [{"step": u + 1, "val/loss": 1 / (u + 1)} for u in range(30)]
    folder = made_runs.make(tmp_path / "one", rows=rows, rewards={}, judges={})
    assert "val/loss" in shown(folder).text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: None, "got nothing that is there; wanted a run's folder, outputs/<run>"),
        (lambda f: f.write_text("x"), "got a file; wanted a run's folder"),
        (lambda f: f.mkdir(), "without config.resolved.yaml and metrics.jsonl"),
    ],
)
def test_a_folder_that_is_no_run(damage, message: str, tmp_path: Path, capsys) -> None:
    damage(tmp_path / "x")
    assert main([str(tmp_path / "x")]) == 2
    told = capsys.readouterr().err
    assert str(tmp_path / "x") in told and message in told
    assert not list(tmp_path.rglob("report.html"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 1}\nrubbish\n{"step": 3}\n', "metrics.jsonl:2: got 'rubbish'"),
        ("metrics.jsonl", '[1]\n{"step": 2}\n', "wanted a JSON object with a step"),
        ("summary.json", "{", "summary.json: not JSON"),
        ("config.resolved.yaml", "a: [", "config.resolved.yaml: not readable as YAML"),
        ("config.resolved.yaml", "- a", "got list; wanted settings by name"),
        ("samples/before.npz", "rubbish", "before.npz: cannot be read"),
        ("samples/strip-10.npz", "rubbish", "strip-10.npz: cannot be read"),
    ],
)
def test_a_damaged_file(name: str, content: str, message: str, tmp_path: Path) -> None:
    folder = made_runs.make(tmp_path / "one")
    (folder / name).write_text(content)
    with pytest.raises(RunError, match=re.escape(message)):
        read_run(folder)


@pytest.mark.parametrize("args", [[], ["--what"], ["-h"]])
def test_how_it_is_called(args: list[str], capsys) -> None:
    assert main(args) == (0 if args == ["-h"] else 2)
    assert "python -m qirl_fast.report RUN" in capsys.readouterr().out


# Warnings: each fires on what it is for, and not on the run in which nothing is wrong.


def changed(rows: list[dict[str, Any]], **values: Callable[[float], float]) -> list[dict[str, Any]]:
    """The rows with metrics as functions of the share of the run that is over."""
    names = {name.replace("__", "/"): value for name, value in values.items()}
    return [
        row | {name: value(u / len(rows)) for name, value in names.items()}
        for u, row in enumerate(rows)
    ]


ROWS = made_runs.metric_rows(40)
FIRES = {
    "reward rises, a judge falls": changed(ROWS, reward__aesthetics=lambda t: 0.6 - 0.3 * t),
    "diversity collapse": changed(ROWS, diversity=lambda t: 20 - 15 * t),
    "ratio before an update": changed(ROWS, pre_update_ratio_error=lambda t: 1e-7 * (t > 0.9)),
    "clip fraction": changed(ROWS, clip_fraction=lambda t: t),
    "missing verdicts": changed(ROWS, failed__alignment=lambda t: 0.06),
}


@pytest.mark.parametrize("name", FIRES)
def test_a_warning_fires_on_what_it_is_for_alone(name: str, tmp_path: Path) -> None:
    folder = made_runs.make(tmp_path / "one", rows=FIRES[name])
    found = {c.name: c.state for c in checks.checks(read_run(folder))}
    assert found.pop(name) == "warning" and set(found.values()) == {"clear"}
    assert "1 warning;" in shown(folder).text and name in shown(folder).text


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("diversity collapse", changed(ROWS, diversity=lambda t: 20 - 8 * t)),
        ("clip fraction", changed(ROWS, clip_fraction=lambda t: 0.85)),
        ("missing verdicts", changed(ROWS, missing__aesthetics=lambda t: 0.4)),
        ("reward rises, a judge falls", changed(ROWS, reward=lambda t: 0.6 - 0.3 * t)),
    ],
)
def test_a_warning_does_not_fire_below_its_bound(name: str, rows, tmp_path: Path) -> None:
    folder = made_runs.make(tmp_path / "one", rows=rows)
    assert {c.name: c.state for c in checks.checks(read_run(folder))}[name] == "clear"


def test_a_judge_that_falls_on_held_out_prompts(tmp_path: Path) -> None:
    folder = made_runs.make(tmp_path / "one", prompts=12, watch=["safety"], rows=ROWS[:5])
    path = folder / "samples"
    for name, lift in (("before", 0.0), ("after", -0.1)):
        with np.load(path / f"{name}.npz") as saved:
            arrays = dict(saved)
        np.savez(path / f"{name}.npz", **arrays, score_safety=0.5 + lift + np.arange(12) / 100)
    found = checks.monitors(read_run(folder))
    assert found.state == "warning" and "safety -0.100" in found.text


def test_several_steps_in_one_forward_may_round(tmp_path: Path) -> None:
    rows = changed(ROWS, pre_update_ratio_error=lambda t: 1e-5)
    folder = made_runs.make(tmp_path / "one", rows=rows, train={"steps": 40, "replay_steps": 2})
    assert checks.exact_ratio(read_run(folder)).state == "clear"


def test_chunks_in_parts_may_round_from_then_on(tmp_path: Path) -> None:
    rows = [row | ({"backoff_rows": 2} if row["step"] > 20 else {}) for row in ROWS]
    for at, state in ((0.8, "clear"), (0.2, "warning")):
        off = changed(rows, pre_update_ratio_error=lambda t, at=at: 1e-5 * (abs(t - at) < 0.1))
        folder = made_runs.make(tmp_path / f"at{at}", rows=off)
        assert checks.exact_ratio(read_run(folder)).state == state


def test_missing_numbers_are_not_clear(tmp_path: Path) -> None:
    folder = made_runs.make(tmp_path / "one", rows=[{"step": u + 1} for u in range(40)])
    (folder / "samples/after.npz").unlink()
    states = {c.name: c.state for c in checks.checks(read_run(folder))}
    assert set(states.values()) == {"not checked"}


def blocky(image: np.ndarray, strength: int) -> np.ndarray:
    """Every second 16-pixel square brighter."""
    y, x = np.indices(image.shape[:2]) // 16
    lifted = image.astype(int) + strength * ((x + y) % 2)[:, :, None]
    return lifted.clip(0, 255).astype(np.uint8)


def test_grid_artefacts_fire_on_a_grid_and_not_on_noise(tmp_path: Path) -> None:
    folder = made_runs.make(tmp_path / "one", prompts=8)
    assert checks.grid_artefacts(read_run(folder)).state == "clear", "noise before, noise after"
    scores = {name: np.full(8, 0.5) for name in made_runs.JUDGES}
    images = made_runs.pictures(8) // 8 + 100
    made_runs.write_held(folder / "samples/before.npz", images, scores)
    gridded = np.stack([blocky(image, 60) for image in images])
    made_runs.write_held(folder / "samples/after.npz", gridded, scores, update=np.array(40))
    found = checks.grid_artefacts(read_run(folder))
    assert found.state == "warning" and "8 prompts" in found.text


def test_large_pictures_are_kept_small_with_the_grid_they_were_drawn_with(tmp_path: Path) -> None:
    folder = made_runs.make(tmp_path / "one")
    noise = made_runs.pictures(2, 1024)[:, :, :768] // 8 + 100
    gridded = np.stack([blocky(image, 60) for image in noise])
    prompts = [Prompt(f"{i:016x}", f"prompt {i}", None, {}) for i in range(2)]
    for name, images, more in (("before", noise, {}), ("after", gridded, {"update": np.array(40)})):
        found = Evaluation({"alignment": np.full(2, 0.5)}, list(images))
        keep(folder / f"samples/{name}.npz", found, prompts, more)
    with np.load(folder / "samples/after.npz") as saved:
        assert saved["image_1"].shape == (512, 384, 3)
    run = read_run(folder)
    assert run.after is not None
    assert run.after.gridness(32).tolist() == [gridness(image) for image in gridded]
    found = checks.grid_artefacts(run)
    assert found.state == "warning" and "2 prompts" in found.text


@pytest.mark.parametrize("shape", [(64, 64), (128, 96), (50, 333)])
def test_gridness_of_noise_is_one_and_of_a_grid_large(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    noise = [generator.integers(90, 160, (*shape, 3), np.uint8) for _ in range(20)]
    # The geometric mean over 20 of a ratio of means of exponential variates.
    assert 0.4 < np.exp(np.mean([np.log(gridness(image)) for image in noise])) < 1.6
    assert gridness(blocky(noise[0], 40)) > 10 * gridness(noise[0])
    assert gridness(np.full((*shape, 3), 7, np.uint8)) == 1


def test_gridness_of_too_small_a_picture_is_not_a_number() -> None:
    assert np.isnan(gridness(np.zeros((31, 64, 3), np.uint8)))


def test_diversity_is_that_of_all_pairs() -> None:
    """Against skimage's Lab of the mean colours, pair by pair."""
    from skimage.color import rgb2lab

    images = made_runs.pictures(6, 32)
    images[3:] //= 2
    parts = images.reshape(6, 8, 4, 8, 4, 3).astype(np.float64).mean((2, 4))
    colours = np.stack([rgb2lab(part / 255) for part in parts])
    expected = []
    for group in (colours[:3], colours[3:]):
        pairs = [(a, b) for a in range(3) for b in range(a)]
        squares = [((group[a] - group[b]) ** 2).sum(-1).mean() for a, b in pairs]
        expected.append(np.sqrt(np.mean(squares)))
    # Two sets of rounded constants for the same matrix and white.
    assert mean_distance(coarse_lab(images), 3) == pytest.approx(np.mean(expected), rel=2e-3)
    assert mean_distance(coarse_lab(images[:1].repeat(4, 0)), 4) == 0
    assert lab(np.array([255.0, 255, 255])) == pytest.approx([100, 0, 0], abs=1e-9)


def test_diversity_does_not_depend_on_the_chunk() -> None:
    images = made_runs.pictures(10, 40)
    whole = coarse_lab(images)
    assert whole.shape == (10, 192) and whole.dtype == np.float32
    assert np.array_equal(np.concatenate([coarse_lab(i[None]) for i in images]), whole)
    assert coarse_lab(np.empty((5, 0, 0, 3), np.uint8)).shape == (5, 0)


# Charts.


def test_a_peak_stays_to_be_seen() -> None:
    y = np.zeros(10_000)
    y[1234] = 5
    x, thin = thinned(np.arange(10_000.0), y)
    assert len(x) <= 300 and thin.max() == 5 and x[thin.argmax()] == 1234


def test_gaps_and_single_points_are_drawn_as_such() -> None:
    x = np.arange(5.0)
    html = chart("t", [Line("a", x, np.array([1, 2, np.nan, 4, 5.0]))])
    assert html.count("<polyline") == 2
    assert "<circle" in chart("t", [Line("a", x, np.array([np.nan, 2, np.nan, np.nan, np.nan]))])
    assert chart("t", [Line("a", x, np.full(5, np.nan))]) == ""


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3e-9, 2e-9), (0.5, 0.50001), (1, 2e6)])
def test_ticks_are_few_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 9
    assert all(low - 1e-6 * (high - low) <= t <= high + 1e-6 * (high - low) for t in found)


# Runs of the trainer.


def test_a_run_ends_with_its_report(finished: Callable[..., Path]) -> None:
    folder = finished("plain")
    found = made_runs.Page((folder / "report.html").read_text(encoding="utf-8"))
    found.require_self_contained()
    assert "2 of 2" in found.text and "update 1" in found.text and "Best after" in found.text
    run = read_run(folder)
    assert run.finished and not run.notes and list(run.strips) == [1]
    assert [image.shape for image in run.strips[1]] == [(64, 64, 3)] * 4
    assert run.after is not None and run.after.update == 2
    assert all(text and "photo" in text for text in run.after.texts)
    assert (run.column("diversity") > 0).all()
    assert all(row["memory_mib"]["process"] > 100 for row in run.timings)
    summary = json.loads((folder / "summary.json").read_text())["judges"]
    assert checks.changes(run) == summary


def test_strips_change_no_number(finished: Callable[..., Path]) -> None:
    one, other = finished("plain"), finished("stripless", "tracking.strips=0")
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert not list((other / "samples").glob("strip*"))
    assert "Nothing was drawn on the way (tracking.strips)" in shown(other).text


def test_a_resumed_run_has_the_same_report(
    finished: Callable[..., Path], small, start, meddle, tmp_path: Path
) -> None:
    whole, argv = finished("plain"), [*small, f"output={tmp_path}", "run=plain", "resume=auto"]
    killed = start(argv, hook=meddle("trainer.Trainer.rollout", 2, KILL, after=False))
    assert killed.wait() == -9
    assert "at update 1 of 2" in shown(tmp_path / "plain").text
    again = start(argv)
    assert again.wait() == 0, again.output()
    for name in ("strip-1", "before", "after"):
        paths = [folder / f"samples/{name}.npz" for folder in (whole, tmp_path / "plain")]
        with np.load(paths[0]) as a, np.load(paths[1]) as b:
            assert set(a) == set(b) and all(np.array_equal(a[n], b[n]) for n in a)
    pages = [(f / "report.html").read_text() for f in (whole, tmp_path / "plain")]
    parts = [re.findall(r"<section>.*?</section>", text, re.S) for text in pages]
    assert len(parts[0]) == 6
    for one, other in zip(*parts, strict=True):
        title = re.search("<h2>(.*?)</h2>", one)
        assert title is not None
        if title[1] == "Curves":  # the clock is another
            one, other = (t.split("<h3>Clock")[0] for t in (one, other))
        if title[1] != "Settings":  # resume and output
            assert one == other, title[1]


def test_pictures_that_cannot_be_drawn_are_said_and_stop_nothing(
    start: Callable[..., Any], small: list[str], meddle: Callable[..., str], tmp_path: Path
) -> None:
    # Chunks 1 to 3: the evaluation before, the first update, its pictures.
    nan = meddle("rollout.sample._sample_chunk", 3, "found.latents[1, 2, 3] = float('nan')")
    run = start([*small, "train.steps=2", f"output={tmp_path}", "run=x"], hook=nan)
    assert run.wait() == 0, run.output()
    assert "no pictures of update 1 for report.html: held-out images: latents" in run.output()
    assert not (tmp_path / "x" / "samples" / "strip-1.npz").exists()
    assert (tmp_path / "x" / "report.html").exists()


def test_a_strip_has_the_pictures_of_the_evaluation(small, tmp_path: Path) -> None:
    from qirl_fast.config import load_config
    from qirl_fast.trainer import Trainer

    settings = [*small, f"output={tmp_path}", "evaluation.samples_per_prompt=2", "run=x"]
    trainer = Trainer(load_config(settings))
    position = trainer.position()
    drawn, whole = trainer.strip(3), trainer.evaluate().images
    assert len(drawn) == 3
    for a, b in zip(drawn, whole, strict=False):
        # A matrix product of another shape may round otherwise, which moves a pixel by one level.
        assert np.abs(a.astype(int) - b.astype(int)).max() <= 1
    assert repr(position["rng"]) == repr(trainer.position()["rng"])
    trainer.close()
