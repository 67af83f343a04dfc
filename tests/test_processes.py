"""A run in several processes is the run in one, to the last bit; what stops one stops all."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds import ended, written

from qirl_fast.data.prompts import load_prompts
from qirl_fast.data.sampler import PromptSampler
from qirl_fast.tiny import packaged

CHUNKS = ("rollout.max_rows=1", "train.updates_per_rollout=2", "evaluation.prompts=3")
STATEFUL = """
class Seen:
    def __call__(self, images, metadata):
        return [0.5] * len(metadata)
    def state_dict(self):
        return {}
    def load_state_dict(self, state):
        pass
score = Seen()
"""
# Fails in the process that sees the prompt it is made for.
FAILS = """
import numpy
def score(images, metadata):
    scores = numpy.linspace(0, 1, len(metadata) + 1)[1:]
    return [float("nan") if row["prompt"] == PROMPT else s for row, s in zip(metadata, scores)]
"""


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_bits_do_not_depend_on_the_number_of_processes(
    processes, finished, tmp_path, count
) -> None:
    alone = finished("alone", *CHUNKS)
    runs = processes(count, [*CHUNKS, f"output={tmp_path}", "run=r"])
    assert ended(runs) == [0] * count, runs[0].output()
    assert written(tmp_path / "r") == written(alone)
    assert f"{count} processes" in runs[0].output()
    for other in runs[1:]:
        assert "step" not in other.output()  # one of them speaks


def test_a_run_goes_on_with_another_number_of_processes(processes, finished, tmp_path) -> None:
    own = [*CHUNKS, f"output={tmp_path}", "run=r", "resume=auto"]
    assert ended(processes(2, [*own, "train.steps=1"])) == [0, 0]
    assert ended(processes(1, own)) == [0]
    assert written(tmp_path / "r") == written(finished("alone", *CHUNKS))


def test_editing_rows_are_shared_too(processes, tmp_path) -> None:
    recipe = Path(__file__).parents[1] / "configs" / "tiny_edit.yaml"
    few = ["train.steps=2", "data.prompts_per_step=3", "rollout.group_size=2", "evaluation.steps=2"]
    for count in (1, 2):
        own = [str(recipe), "threads=1", *few, *CHUNKS, f"output={tmp_path}", f"run=by{count}"]
        runs = processes(count, own)
        assert ended(runs) == [0] * count, runs[0].output()
    assert written(tmp_path / "by2") == written(tmp_path / "by1")


@pytest.mark.chaos("one process fails: all stop, nothing is applied")
def test_a_reward_that_is_none_in_one_process_stops_all(processes, tmp_path) -> None:
    rows = load_prompts(packaged("tiny:train"))
    first = next(PromptSampler(rows, 2, 0))  # of two processes each has one of them
    (tmp_path / "fails.py").write_text(FAILS.replace("PROMPT", repr(first[1].prompt)))
    own = ["rollout.max_rows=1", "rewards={'fails:score': 1.0}", f"output={tmp_path}", "run=r"]
    evaluation = ["evaluation.prompts=2"]  # of other prompts
    runs = processes(2, [*own, *evaluation], [tmp_path])
    assert ended(runs) == [1, 1], runs[0].output()
    batch = tmp_path / "r/failed/step-1/process-1"
    assert f"row 4 ({first[1].prompt!r}): scored nan" in runs[0].output()
    assert f"The batch is in {batch};" in runs[0].output() and (batch / "batch.npz").exists()
    assert "stopped" not in runs[1].output()  # one of them speaks


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.updates_per_rollout=1", "rollout.max_rows=8"], "in 1 chunks of 8; start at most"),
        ([*CHUNKS, "rewards={'seen:score': 1.0}"], "judges seen:score: keep a state"),
    ],
)
def test_what_cannot_be_shared_is_refused(processes, tmp_path, settings, said) -> None:
    (tmp_path / "seen.py").write_text(STATEFUL)
    runs = processes(2, [*settings, f"output={tmp_path}", "run=r"], [tmp_path])
    assert ended(runs) == [2, 2]
    assert said in runs[0].output() and not (tmp_path / "r").exists()
    assert runs[1].output() == ""
