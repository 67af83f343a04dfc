"""NaN and infinity while a run goes on: the step stops, its batch is kept, the run resumes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

Start = Callable[..., Any]

# Scores of a training batch (eight images) follow the file `mode`; an evaluation has four, and a
# failed row is asked again by itself.
JUDGE = """
import numpy
from pathlib import Path
from qirl_fast.rewards.judge import Scored

batches = 0

def score(images, metadata):
    global batches
    scores = (images.mean((1, 2, 3)) / 255).astype(numpy.float32)
    mode = (Path(__file__).parent / "mode").read_text()
    if len(metadata) == 8:
        batches += 1
    if mode == "held-out" and len(metadata) == 4:
        scores[1] = numpy.nan
    if mode == "later" and len(metadata) != 8 and batches == 2:
        raise RuntimeError("no contact")
    if mode == "nothing" and len(metadata) == 4:
        return numpy.ma.masked_array(scores, [True, False, False, False])
    if mode == "raise" and len(metadata) != 8 or mode == "away" and batches == 3:
        raise RuntimeError("no contact")
    if mode == "partly" and len(metadata) != 4:
        failed = [row["prompt"] == metadata[0]["prompt"] and batches == 2 for row in metadata]
        return Scored(scores, numpy.int8(failed), {i: "no face" for i in range(len(failed))})
    if mode in ("nan", "inf", "-inf") and batches == 2:
        scores[5] = float(mode)
    if mode == "short" and batches == 2:
        return scores[:3]
    return scores
"""


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of these tests lie, one folder a name, and the judge with its mode."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "moody.py").write_text(JUDGE)
    return folder


@pytest.fixture(scope="module")
def moody(small: tuple[str, ...], start: Start, output: Path) -> Callable[..., Any]:
    """`moody(name, mode, *settings, hook="")`: an ended run under a judge in that mode."""

    def run(name: str, mode: str, *settings: str, hook: str = "") -> Any:
        (output / "mode").write_text(mode)
        argv = [*small, "train.steps=3", "rewards={'moody:score': 1.0}", f"output={output}"]
        process = start([*argv, f"run={name}", *settings], paths=[output], hook=hook)
        process.wait()
        return process

    return run


@pytest.fixture(scope="module")
def whole(moody: Callable[..., Any], output: Path) -> tuple[bytes, bytes]:
    """Metrics and state of the run in which nothing goes wrong."""
    run = moody("whole", "fine")
    assert run.wait() == 0, run.output()
    return outcome(output / "whole")


def outcome(run: Path) -> tuple[bytes, bytes]:
    state = run / "checkpoints" / "checkpoint-3" / "state.safetensors"
    return (run / "metrics.jsonl").read_bytes(), state.read_bytes()


@pytest.mark.chaos("NaN in reward, loss, gradient, weights: the step stops, nothing is applied")
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "short"])
def test_a_reward_that_is_no_number(moody, output: Path, whole, read_jsonl, value: str) -> None:
    name = f"reward{value}"
    row, what = (0, r"the result has shape \(3,\)") if value == "short" else (5, f"scored {value}")
    broken = moody(name, value)
    said = broken.output()
    assert broken.wait() == 1, said
    assert re.search(
        rf"stopped: step 2 is stopped, its update not applied: judge 'moody:score', row {row} "
        rf"\('a photo of .*'\): {what}.* The batch is in .*/{name}/failed/step-2; after mending "
        r"the cause run the same command with resume=auto",
        said,
    )
    assert "Traceback" not in said
    folder = output / name
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [1]
    assert_batch_is_saved(folder / "failed" / "step-2")
    if value != "short":
        with np.load(folder / "failed" / "step-2" / "batch.npz") as batch:
            np.testing.assert_equal(batch["scores"][5, -1], np.float32(value), "as the judge said")
    mended = moody(name, "fine", "resume=auto")
    assert mended.wait() == 0, mended.output()
    assert "from step 1 to 3" in mended.output()
    assert outcome(folder) == whole


@pytest.mark.chaos("a judge fails: counted within its budget, a stop beyond it")
def test_a_judge_that_stays_away_stops_the_run_with_its_state_saved(
    moody, output: Path, whole, read_jsonl
) -> None:
    """No checkpoint is due before the end; the one written at the stop is all there is."""
    settings = ("tracking={checkpoint_every: 0}", "failures={reask: 2, budget: 0.5}")
    broken = moody("away", "away", *settings)
    said = broken.output()
    assert broken.wait() == 1, said
    assert re.search(
        r"stopped: step 3 is stopped, .*judge 'moody:score' failed on 100% of the images "
        r"\(failures.reask=2\) and failures.budget allows 50%; the first reason: "
        r"RuntimeError\('no contact'\)",
        said,
    )
    assert sorted(p.name for p in (output / "away" / "checkpoints").iterdir()) == [
        "checkpoint-2",
        "latest",
    ]
    mended = moody("away", "fine", "resume=auto", *settings)
    assert mended.wait() == 0, mended.output()
    assert "from step 2 to 3" in mended.output()
    assert outcome(output / "away") == whole


@pytest.mark.chaos("a judge fails: counted within its budget, a stop beyond it")
def test_within_its_budget_a_failure_costs_its_group_alone(moody, output: Path, read_jsonl) -> None:
    run = moody("partly", "partly", "failures={reask: 1, budget: 0.5}")
    assert run.wait() == 0, run.output()
    rows = read_jsonl(output / "partly" / "metrics.jsonl")
    assert [row["failed/moody:score"] for row in rows] == [0.0, 0.5, 0.0]
    assert [row["kept_groups"] for row in rows] == [1.0, 0.5, 1.0]
    assert [row["missing/moody:score"] for row in rows] == [0.0] * 3


def assert_batch_is_saved(failed: Path) -> None:
    """Images, prompts and the states of both recorded steps, readable without this package."""
    with np.load(failed / "batch.npz") as batch:
        assert batch["images"].shape == (8, 64, 64, 3) and batch["images"].std() > 0
        assert batch["scores"].shape == batch["status"].shape == (8, 3)
    rows = [json.loads(line) for line in (failed / "prompts.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all("include" in row for row in rows)
    states = load_file(failed / "trajectories.safetensors")
    names = {f"rows0.step{i}.{name}" for i in (0, 1) for name in ("x", "x_next", "logp")}
    assert set(states) == names
    assert states["rows0.step0.x"].shape == (8, 16, 16)


# The first is a weight gone bad, seen by the loss; the second a backward gone bad.
POISON = {
    "loss": """
        if self.optimizer_steps == 1:
            next(iter(self.trainable.values())).data.fill_(float("nan"))
    """,
    "gradient": """
        if self.optimizer_steps == 1:
            next(iter(self.trainable.values())).register_hook(lambda g: g * float("inf"))
    """,
}
HOOK = """
from qirl_fast.learner import Learner
whole = Learner.{method}
def poisoned(self, *arguments):
{poison}
    return whole(self, *arguments)
Learner.{method} = poisoned
"""


@pytest.mark.chaos("NaN in reward, loss, gradient, weights: the step stops, nothing is applied")
@pytest.mark.parametrize("what", list(POISON))
def test_a_loss_or_gradient_that_is_no_number(moody, output: Path, whole, what: str) -> None:
    poison = "\n".join(line[4:] for line in POISON[what].splitlines())
    hook = HOOK.format(method="update", poison=poison)
    broken = moody(what, "fine", hook=hook)
    said = broken.output()
    assert broken.wait() == 1, said
    reason = {"loss": r"the loss of rows .* is nan", "gradient": r"the gradient norm is (nan|inf)"}
    assert re.search(rf"stopped: step 2 is stopped, .*{reason[what]}.*resume=auto", said)
    assert_batch_is_saved(output / what / "failed" / "step-2")
    mended = moody(what, "fine", "resume=auto")
    assert mended.wait() == 0, mended.output()
    assert outcome(output / what) == whole


@pytest.mark.chaos("NaN in reward, loss, gradient, weights: the step stops, nothing is applied")
def test_weights_that_are_no_numbers_are_not_saved(moody, output: Path) -> None:
    hook = HOOK.format(
        method="update", poison="\n".join(line[4:] for line in POISON["loss"].splitlines())
    )
    broken = moody("rotten", "fine", "tracking={checkpoint_every: 0}", hook=hook)
    assert broken.wait() == 1, broken.output()
    assert not list((output / "rotten" / "checkpoints").iterdir())


def test_a_learning_rate_that_bursts_the_weights(moody, output: Path) -> None:
    """Nothing is patched here: weights of 1e30 make the next latents or loss NaN by themselves."""
    broken = moody("burst", "fine", "train.lr=1e30")
    assert broken.wait() == 1, broken.output()
    reason = r"(is (nan|-?inf)|rollout: row .*: latents are not finite in \d+ of \d+ rows)"
    assert re.search(rf"stopped: step 2 is stopped, .*{reason}", broken.output())
    assert (output / "burst" / "failed" / "step-2" / "batch.npz").exists()


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("held-out", r"held-out images: judge 'moody:score', row 1: scored nan"),
        ("raise", r"judges \['moody:score'\] failed on up to 100% of the held-out images"),
    ],
    ids=["nan", "raise"],
)
def test_held_out_images_that_cannot_be_scored(moody, mode: str, reason: str) -> None:
    run = moody(mode, mode)
    assert run.wait() == 1, run.output()
    assert re.search(rf"stopped: {reason}.*run the same command with resume=auto", run.output())
    mended = moody(mode, "fine", "resume=auto")
    assert mended.wait() == 0, mended.output()


def test_an_evaluation_that_fails_loses_no_update(moody, output: Path, whole, read_jsonl) -> None:
    settings = ("evaluation.every=2", "tracking={checkpoint_every: 0}")
    broken = moody("later", "later", *settings)
    assert broken.wait() == 1, broken.output()
    assert "failed on up to 100% of the held-out images" in broken.output()
    rows = read_jsonl(output / "later" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and "heldout/alignment" not in rows[1]
    mended = moody("later", "fine", "resume=auto", *settings)
    assert mended.wait() == 0, mended.output()
    assert "from step 2 to 3" in mended.output()
    assert outcome(output / "later")[1] == whole[1]


def test_a_prompt_with_nothing_to_judge_leaves_the_comparison(moody, output: Path) -> None:
    """The judge stands first, so the pictures show its scores."""
    settings = ("rewards=null", "watch=null", "rewards={'moody:score': 1.0}", "watch=[alignment]")
    run = moody("nothing", "nothing", *settings, "tracking={samples_every: 1}")
    assert run.wait() == 0, run.output()
    summary = json.loads((output / "nothing" / "summary.json").read_text())
    assert {name: row["n"] for name, row in summary["judges"].items()} == {
        "moody:score": 3,
        "alignment": 4,
    }
    assert (output / "nothing" / "samples" / "before_after.png").exists()
