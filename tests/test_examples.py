"""examples/: each runs as its README says, and what it compares is the same."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
BIN = Path(sys.executable).parent
NUMBER = r"([-+.e\d]+)"


def run(command: list[str | Path], **environment: str) -> str:
    """What the command prints."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    """The numbers of the one place where the pattern's NUMBERs match."""
    (found,) = re.findall(pattern.replace("NUMBER", NUMBER), text)
    return [float(value) for value in ([found] if isinstance(found, str) else found)]


def section(name: str) -> str:
    (found,) = re.findall(rf"^## {name}\.py\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.M)
    return str(found)


@pytest.mark.parametrize("name", NAMES)
def test_readme_names_each_example_and_imports_it_has(name: str) -> None:
    code = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert f"examples/{name}.py" in section(name)
    (diff,) = re.findall(r"^```diff\n(.*?)^```", section(name), re.DOTALL | re.M)
    added = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    imports = [line for line in added if re.match("import |from ", line)]
    assert imports and set(imports) <= set(code.splitlines())
    for call in re.findall(r"\b(?:ops|qirl_fast)\.\w+\(", "\n".join(added)):
        assert call in code


@pytest.mark.slow  # a process of its own imports torch and diffusers
def test_flow_grpo_loop() -> None:
    """Variants agree after two updates, with ratios on both sides of the clip bound of 1e-3.

    Velocities differ by 5e-6 at most (fused blocks round in another order), and a log-probability
    moves by |c| / s < 1 times the mean of their differences, with a sign each. Advantages inherit
    the rounding of float32 rewards over their deviation of some hundredths: 1e-6 or so of a loss of
    5e-4. A row that one variant clips and the other does not would be 1 / 48 of the gradient.
    """
    out = run([sys.executable, "examples/flow_grpo_loop.py", "--pixels", "64", "--repeats", "1"])
    parts = re.findall(rf"^(\w[\w: ]*?) +{NUMBER} +{NUMBER} +{NUMBER}x$", out, re.M)
    assert [part for part, *_ in parts] == [
        "sample: velocity",
        "sample: step",
        "advantage",
        "train: velocity",
        "train: score",
        "train: loss",
        "train: backward",
        "total",
    ]
    ratio, plain, fused = numbers("ratios up to NUMBER, losses NUMBER and NUMBER", out)
    assert ratio > 1.001
    assert abs(plain) > 1e-4 and fused == pytest.approx(plain, abs=5e-6)
    logp, gradient = numbers("differ by NUMBER at most, gradients by NUMBER of", out)
    assert logp <= 5e-6 and gradient <= 1e-4


@pytest.mark.slow
def test_diffusers_training() -> None:
    """Losses agree through four updates: float32 rounding, which AdamW may carry on."""
    options = ["--pixels", "64", "--batch", "2", "--steps", "4"]
    out = run([sys.executable, "examples/diffusers_training.py", *options])
    pairs = re.findall(rf"^step +\d+ +loss {NUMBER} {NUMBER}$", out, re.M)
    assert len(pairs) == 2 and pairs[0] != pairs[1]
    assert numbers("losses differ by NUMBER of themselves", out)[0] <= 1e-5
    assert len(numbers("stock NUMBER, fused NUMBER, gain NUMBERx", out)) == 3


@pytest.mark.slow
def test_accelerate_trains_on_the_same_samples_in_one_process_and_in_two() -> None:
    """The ratio before an update is 1; update 1 is drawn by weights that update 0 has moved.

    Another number of rows may round products otherwise: pixels move by a level here and there,
    1e-4 of a score; AdamW's first step is the sign of a gradient, so small ones move weights.
    Advantages of each process's own samples give another reward altogether (see the third).
    """
    script = ["examples/accelerate_grpo.py", "--updates", "2", "--group", "4"]
    one = run([BIN / "accelerate", "launch", "--cpu", "--num_processes", "1", *script])
    torchrun = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2"]
    two = run([*torchrun, *script], ACCELERATE_USE_CPU="true")
    line = rf"^update +\d+ +reward {NUMBER} +ratio off 1 by {NUMBER} +seconds {NUMBER}$"
    updates = [re.findall(line, out, re.M) for out in (one, two)]
    assert [len(found) for found in updates] == [2, 2]
    assert {float(drift) for found in updates for _, drift, _ in found} == {0.0}
    (first, second), (first_of_two, second_of_two) = (
        [float(reward) for reward, *_ in found] for found in updates
    )
    assert first_of_two == pytest.approx(first, abs=1e-4)
    assert second_of_two == pytest.approx(second, abs=5e-3)
    assert abs(second - first) > 1e-2


@pytest.mark.parametrize("name", ["flow_grpo_loop", "diffusers_training"])
def test_sizes_the_model_cannot_draw_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--pixels", "50"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert "'pixels': 50" in error and "want pixels a multiple of 32" in error
