"""`python -m qirl_fast.evaluate`: the whole command, its cache, being killed, bad input."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from qirl_fast.evaluate import main

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (
    "threads=1",
    "prompts=tiny:heldout",
    "count=4",
    "samples_per_prompt=2",
    "steps=2",
    "guidance=1.5",
    "max_rows=4",
    "score=[alignment,aesthetics]",
)


@pytest.fixture(scope="module")
def run(finished: Callable[..., Path]) -> Path:
    """A finished small run."""
    return finished("evaluated")


@pytest.fixture
def command(run: Path, tmp_path: Path) -> list[str]:
    """Two models on four prompts; seconds."""
    path = tmp_path / "evaluate.yaml"
    path.write_text(
        f"output: {tmp_path / 'out'}\nmodels: {{base: {{}}, trained: {{adapter: {run}}}}}\n"
        'prompts: "tiny:heldout"\ngeneval: {judge: geneval}\n'
    )
    return [str(path), *SETTINGS]


def images(folder: Path) -> dict[str, bytes]:
    """The cache, by relative path."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("images/*/*.png"))
    }


def refused(command: list[str], capsys: Any, *more: str) -> str:
    """What is said of settings that are refused."""
    capsys.readouterr()
    code = main([*command, *more])
    said = capsys.readouterr()
    assert code == 2, said
    return " ".join(said.err.split())


def test_two_models_end_to_end(command: list[str], tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "base: 0 of 8 images are there, drawing 8" in said
    assert "trained: against 221 training prompts of tiny:train (evaluated): " in said
    assert "to see +0.02 you need" in said
    told = json.loads((out / "evaluation.json").read_text())
    assert list(told["models"]) == ["base", "trained"]
    # The packaged splits share no scene; as sets of words some differ in their order alone.
    assert {leak["kind"] for leak in told["leaks"]["found"]} <= {"near"}
    assert told["prompts"]["count"] == 4 and told["prompts"]["sizes"] == {"64 x 64": 4}
    assert told["prompts"]["split"] == "heldout" and len(told["prompts"]["sha256"]) == 64
    assert [(c["judge"], c["model"], c["other"]) for c in told["comparisons"]] == [
        (judge, "trained", "base") for judge in ("alignment", "aesthetics", "geneval")
    ]
    rows = list(csv.DictReader((out / "evaluation.csv").open()))
    assert len(rows) == 2 * 4 * 2 * 3
    mine = [float(r["score"]) for r in rows if (r["model"], r["judge"]) == ("base", "alignment")]
    found = told["scores"]["alignment"]["base"]["all"]
    assert found == {"value": pytest.approx(np.mean(mine)), "prompts": 4}
    text = (out / "evaluation.md").read_text()
    for words in ("seed 1234", "split heldout", "## Leaks", "Holm p", "GenEval", "you need"):
        assert words in text
    assert (out / "evaluation.png").stat().st_size > 1000

    before = {p.name: p.read_bytes() for p in out.glob("evaluation.*")}
    kept = images(out)
    assert len(kept) == 16
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.count("8 of 8 images are there, nothing is drawn") == 2
    assert {p.name: p.read_bytes() for p in out.glob("evaluation.*")} == before, "the same tables"
    assert images(out) == kept


def test_a_base_is_itself_after_an_adapter(command: list[str], tmp_path: Path, run: Path) -> None:
    """The order in which models are drawn changes no bit, nor does more than one worker."""
    assert main(command) == 0
    first = images(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    path = Path(command[0])
    path.write_text(
        path.read_text().replace("base: {}, ", "").replace(f"{run}}}", f"{run}}}, base: {{}}")
    )
    assert main([*command, "threads=2"]) == 0
    assert images(tmp_path / "out") == first
    half = len(first) // 2
    assert len(set(first.values())) == 2 * half, "two models, two sets of images"


def test_as_the_trainer_evaluates(
    command: list[str], tmp_path: Path, run: Path, small: Any
) -> None:
    """The same noise, prompts and judges as a run's own evaluation: its summary's numbers."""
    more = ["samples_per_prompt=1", "steps=3", "max_rows=8"]
    assert main([*command, *more]) == 0
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    summary = json.loads((run / "summary.json").read_text())["judges"]["alignment"]
    scores = told["scores"]["alignment"]
    # Drawn in chunks of another size, whose matrix products may round otherwise.
    assert scores["base"]["all"]["value"] == pytest.approx(summary["before"], abs=2e-3)
    assert scores["trained"]["all"]["value"] == pytest.approx(summary["after"], abs=2e-3)


@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_a_damaged_image_is_drawn_again(
    command: list[str], tmp_path: Path, capsys: Any, damage: str
) -> None:
    out = tmp_path / "out"
    assert main(command) == 0
    kept = images(out)
    path = sorted(out.rglob("images/*/*.png"))[5]
    data = bytearray(path.read_bytes())
    data[-30] ^= 4
    path.write_bytes(data if damage == "flipped" else data[:40])
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"{path} is damaged (SHA-256 differs); its chunk of 4 images is drawn again" in said
    assert "4 of 8 images are there, drawing 4" in said and "nothing is drawn" in said
    assert images(out) == kept


@pytest.mark.slow
def test_killed_half_way_it_goes_on(command: list[str], tmp_path: Path, capsys: Any) -> None:
    whole = tmp_path / "whole"
    more = ["count=24", "max_rows=2"]
    assert main([*command, *more, f"output={whole}"]) == 0
    words = [sys.executable, "-m", "qirl_fast.evaluate", *command, *more]
    out = tmp_path / "out"
    process = subprocess.Popen(words, cwd=ROOT, env=os.environ, stdout=subprocess.DEVNULL)
    try:
        for _ in range(50_000):
            if len(list(out.rglob("images/*/*.json"))) >= 2 or process.poll() is not None:
                break
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    there = len(list(out.rglob("images/*/*.json")))
    assert there >= 2 and not (out / "evaluation.json").exists(), "killed in the middle"
    capsys.readouterr()
    assert main([*command, *more]) == 0
    said = capsys.readouterr().out
    assert "base: 0 of" not in said and " of 48 images are there, drawing " in said
    assert images(out) == images(whole)
    found = [(f / "evaluation.json").read_bytes() for f in (out, whole)]
    assert found[0] == found[1]


def test_the_last_run(command: list[str], tmp_path: Path, run: Path, capsys: Any) -> None:
    last = "models.trained.adapter=last"
    said = refused(command, capsys, last, f"runs={tmp_path}")
    assert "models.trained.adapter: no run in" in said and "train one first (make train)" in said
    assert main([*command, last, f"runs={run.parent}", "models.base.guidance=1"]) == 0
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert told["models"]["trained"]["adapter"].startswith(str(run))
    assert told["models"]["base"]["guidance"] == 1


def test_a_prompt_of_pipes_and_html(command: list[str], tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "odd.txt"
    odd = "a | b <script>x</script> [red]bold[/red] | `c`"
    path.write_text(f"{odd}\na red circle\n")
    more = [f"prompts={path}", f"training=[{path}]", "score=[aesthetics]", "geneval=null"]
    assert main([*command, *more, "count=null"]) == 0
    said = capsys.readouterr().out
    assert "settings: against 2 training prompts" in said and "2 the same row" in said
    text = (tmp_path / "out" / "evaluation.md").read_text()
    assert "<script>" not in text and "\\[red\\]bold" in text and "a \\| b" in text
    for line in text.splitlines():
        if line.startswith("| 1 | the same row"):
            assert line.replace("\\|", "").count("|") == 7
    rows = list(csv.DictReader((tmp_path / "out" / "evaluation.csv").open()))
    assert rows[0]["prompt"] == odd
    assert "2 evaluated prompts were trained on" in refused(
        command, capsys, *more, "count=null", "leaks=stop"
    )


BAD = {
    "no models": (["models={}"], "models: got {} (mapping); wanted a mapping"),
    "missing judge": (["score=[alignmnet]"], "no judge is called 'alignmnet': did you mean"),
    "missing judge of a table": (["geneval.judge=x"], "geneval.judge: no judge is called 'x'"),
    "no judge": (["score=[]", "geneval=null"], "score: no judge is named"),
    "a judge twice": (["score=[alignment,alignment]"], "names a judge twice"),
    "judge unused": (["judges.t={kind: ocr}"], "judges.t: is used nowhere"),
    "ocr of another kind": (
        ["judges.t={kind: preservation}", "ocr.judge=t"],
        "ocr.judge: 't' is of kind preservation",
    ),
    "no such model": (["models.x={path: nowhere}"], "models.x.path: no such folder: 'nowhere'"),
    "no adapter there": (["models.x={adapter: docs}"], "models.x.adapter: 'docs' is no adapter"),
    "no such baseline": (["baseline=best"], "baseline: got 'best'; the models are base, trained"),
    "half a size": (["height=64"], "height, width: got 64 and None"),
    "no such prompts": (["prompts=tiny:test"], "prompts: got 'tiny:test'; packaged prompts"),
    "no prompt file": (["prompts=none.jsonl"], "none.jsonl: cannot be read"),
    "too many prompts": (["count=1000"], "count: got 1000; tiny:heldout has 96 prompts"),
    "a name of two lines": (['models={"a\\nb": {}}'], "models: got the name 'a\\nb'; wanted 1 to"),
    "one prompt": (["count=1"], "gives 1; an interval needs two"),
    "an edit without its judge": (["score=[edit_accuracy]"], "can score none of these rows"),
    "unknown key": (["sampels_per_prompt=2"], "did you mean samples_per_prompt"),
    "a size the model cannot draw": (["height=48", "width=80"], "height, width:"),
    "no common words": (["near=0"], "near: got 0"),
    "alpha above power": (["alpha=0.9"], "alpha 0.9 is not below power 0.8"),
    "facets of a rubric": (
        ["facets={judge: {kind: openai, url: 'http://x', model: m}, rubric: none.yaml}"],
        "none.yaml: cannot be read",
    ),
    "an image of none": (["prompts=tiny:heldout", "images=docs", "score=[x:y]"], "judge 'x:y'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_refused_before_anything_is_drawn(
    command: list[str], tmp_path: Path, capsys: Any, case: str, monkeypatch: Any
) -> None:
    monkeypatch.chdir(ROOT)
    settings, words = BAD[case]
    if case == "no models":
        path = Path(command[0])
        path.write_text('output: x\nmodels: {}\nprompts: "tiny:heldout"\n')
        settings = []
    assert words in refused(command, capsys, *settings)
    assert not images(tmp_path / "out")


def test_a_name_twice(command: list[str], capsys: Any) -> None:
    path = Path(command[0])
    path.write_text('output: x\nmodels:\n  a: {}\n  a: {guidance: 2}\nprompts: "tiny:heldout"\n')
    assert "duplicate key a" in refused(command, capsys)


def test_an_adapter_that_does_not_fit(
    command: list[str], run: Path, tmp_path: Path, capsys: Any
) -> None:
    own = tmp_path / "lora"
    shutil.copytree(run / "checkpoints" / "latest" / "lora", own)
    weights = load_file(own / "adapter_model.safetensors")
    key = sorted(k for k in weights if "lora_A" in k)[0]
    save_file(weights | {key: weights[key][:, :-8].contiguous()}, own / "adapter_model.safetensors")
    said = refused(command, capsys, f"models.x={{adapter: {own}}}")
    assert "models.x: the adapter of 'x'" in said and "does not fit" in said
    (own / "adapter_model.safetensors").unlink()
    assert "half an adapter" in refused(command, capsys, f"models.x={{adapter: {own}}}")
    assert not images(tmp_path / "out")


def test_runs_of_different_sizes(
    command: list[str], run: Path, tmp_path: Path, capsys: Any
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other, symlinks=True)
    recipe = other / "config.resolved.yaml"
    recipe.write_text(
        recipe.read_text().replace("height: 64", "height: 32").replace("width: 64", "width: 32")
    )
    small = f"models.small={{adapter: {other}}}"
    said = refused(command, capsys, small)
    assert "'trained' was trained at 64 x 64, 'small' was trained at 32 x 32" in said
    assert "images of different size are not comparable; set the one size" in said
    assert main([*command, small, "height=32", "width=32"]) == 0
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert told["prompts"]["sizes"] == {"32 x 32": 4}
    nothing = ["models={base: {}}"]
    path = Path(command[0])
    path.write_text(path.read_text().replace(f", trained: {{adapter: {run}}}", ""))
    assert "set height and width" in refused(command, capsys, *nothing)


def test_edits_of_different_sizes(command: list[str], tmp_path: Path, capsys: Any) -> None:
    rows = []
    for i, (h, w) in enumerate([(64, 64), (128, 128), (64, 128)]):
        Image.fromarray(np.full((h, w, 3), 200, np.uint8)).save(tmp_path / f"{i}.png")
        rows.append({"prompt": "make it red", "image": f"{i}.png"})
    path = tmp_path / "edits.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    more = [f"prompts={path}", "count=null", "score=[aesthetics]", "geneval=null"]
    assert main([*command, *more]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "1 of 3 edits have a source of another aspect ratio than 64 x 64 (row 3: 64 x 128" in said
    )
    assert "all are drawn at that one size" in said
    assert main([*command, *more, "buckets=[[64,64],[32,64]]"]) == 0
    assert "aspect ratio" not in capsys.readouterr().out
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert told["prompts"]["sizes"] == {"64 x 64": 2, "32 x 64": 1}
    rows[1]["image"] = "gone.png"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert "gone.png: cannot be read" in refused(command, capsys, *more)


def failing(images: np.ndarray, rows: list[dict[str, Any]]) -> np.ndarray:
    """A judge that is broken."""
    raise RuntimeError("no light")


def test_a_judge_that_fails(command: list[str], capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert main([*command, "score=['test_evaluate:failing']"]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "failed on 100% of the images of 'base'" in said and "no light" in said
    assert "images that were drawn are kept" in said


def test_facets_over_a_server_and_text(command: list[str], tmp_path: Path, capsys: Any) -> None:
    """Every table at once; a second call asks the server nothing."""
    sys.path.insert(0, str(Path(__file__).parent / "evaluation"))
    try:
        from test_facets import SMALL, answered, serving
    finally:
        sys.path.pop(0)
    rubric = tmp_path / "rubric.yaml"
    rubric.write_text(json.dumps(SMALL))
    asked: list[int] = []

    def write(body: dict[str, Any]) -> str:
        asked.append(1)
        if len(asked) == 1:
            return "I cannot say."
        return answered(body, len(asked) % 3)

    with serving(write) as url:
        judge = f"{{kind: openai, url: '{url}', model: m, concurrency: 1}}"
        more = [f"facets={{judge: {judge}, rubric: {rubric}, tries: 1}}", "failures.budget=0.5"]
        assert main([*command, *more]) == 0
        first = len(asked)
        assert first == 2 * 8 * 2, "models, images, pillars"
        said = capsys.readouterr().out
        assert "facets failed on 1 images of base: no JSON object in the answer" in said
        told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
        assert {c["judge"] for c in told["comparisons"]} >= {"facets", "facets/Looks"}
        entries = {tuple(e["path"]): e for e in told["facets"]["base"]}
        assert entries[()]["images"] == 7 and entries[()]["failed"] == 1
        text = (tmp_path / "out" / "evaluation.md").read_text()
        assert "## Facets" in text and "1 failed" in text and "## Failures" in text
        assert main([*command, *more]) == 0
        assert len(asked) == first + 8, "only the chunk of four images with a failure"
    settings = [f"facets.judge.url={url}", "facets.judge.retries=0"]
    assert main([*command, *more, *settings, "seed=5"]) == 1
    assert "judge 'facets' failed on 100% of the images" in " ".join(
        capsys.readouterr().err.split()
    )
