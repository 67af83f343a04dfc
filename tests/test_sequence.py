"""Processes that share the tokens of each sample train as one process does.

Velocities differ by rounding: matrix products have other heights, so a velocity is off by some 1e-6
of itself, and what is drawn from it as much. Gradients are added up process by process. AdamW
divides a gradient by its own size: an element that is a hundredth of the others is off by a hundred
times as much of itself, and moves as far as they do; a LoRA's B, which starts at 0, is nothing but
such moves. Seen were 4e-6 of metrics and 1e-5 of B; CLOSE leaves ten times that.
"""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from diffusers import QwenImage21Transformer2DModel, QwenImagePipeline
from small_transformers import qwen_parts, randomised
from worlds import CLOSE, close, ended, metrics

from qirl_fast.checkpoint import load_checkpoint
from qirl_fast.config import ConfigError, load_config, require_work
from qirl_fast.memory import plan
from qirl_fast.models.flux import Flux
from qirl_fast.models.qwenimage_edit import QwenImageEdit
from qirl_fast.preflight import require_sharing

CHUNKS = ("rollout.max_rows=2", "train.updates_per_rollout=2", "evaluation.prompts=3")
LORA = (*CHUNKS, "watch=['seen:score']")
FULL = (*CHUNKS, "model.adapter=full", "train.lr=0.0005", "algorithm.kl_weight=0.1")

# How many images it was shown, by each process.
SEEN = """
import os
def score(images, metadata):
    with open(FILE, "a") as file:
        file.write(f"{len(images)} {os.environ.get('RANK', '0')}\\n")
    return images.mean((1, 2, 3)) / 255
"""


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Callable[[str], Path]:
    """Model folders with two heads and random weights, by family; the packaged one has three."""
    output = tmp_path_factory.mktemp("models")

    def make(family: str) -> Path:
        path = output / family
        if path.exists():
            return path
        if family == "qwenimage":
            parts = qwen_parts(weights, num_attention_heads=2)
            QwenImagePipeline(**parts).save_pretrained(path)
            return path
        shutil.copytree(weights, path)
        config = QwenImage21Transformer2DModel.load_config(path / "transformer")
        shutil.rmtree(path / "transformer")
        config |= {"num_attention_heads": 2, "num_layers": 2}
        randomised(QwenImage21Transformer2DModel.from_config(config)).save_pretrained(
            path / "transformer"
        )
        return path

    return make


@pytest.fixture
def run(processes, tmp_path, folders) -> Callable[..., Path]:
    """`run(name, count, sequence, settings, family)`: the folder of a run that ended with `codes`,
    by default all 0; hook: source that each process runs before.
    """

    def go(
        name: str,
        count: int,
        sequence: int,
        settings: Sequence[str],
        family: str = "qwenimage21",
        hook: str = "",
        codes: Sequence[int] = (),
    ) -> Path:
        seen = tmp_path / f"seen-{name}"
        seen.mkdir(exist_ok=True)
        (seen / "seen.py").write_text(SEEN.replace("FILE", repr(str(seen / "seen.txt"))))
        own = [*settings, f"model.path={folders(family)}", f"processes.sequence={sequence}"]
        runs = processes(count, [*own, f"output={tmp_path}", f"run={name}"], [seen], hook)
        assert ended(runs) == list(codes or [0] * count), runs[0].output()
        return tmp_path / name

    return go


def test_two_processes_train_as_one_and_show_each_image_once(run) -> None:
    one, two = run("one", 1, 1, LORA), run("two", 2, 2, LORA)
    close(two, one, CLOSE)
    assert [row["pre_update_ratio_error"] for row in metrics(two)] == [0, 0]
    told = [(f.parent / f"seen-{f.name}" / "seen.txt").read_text().split() for f in (one, two)]
    total = [sum(map(int, of[::2])) for of in told]
    assert total[0] == total[1] and {*told[1][1::2]} == {"0", "1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "sequence", "settings", "family"),
    [
        (4, 2, LORA, "qwenimage21"),
        (4, 2, FULL, "qwenimage"),
        (2, 2, (*LORA, "rollout.ratio_mode=full", "train.recompute_blocks=1"), "qwenimage"),
        (2, 2, (*FULL, "processes.shard=0"), "qwenimage21"),
        (4, 2, (*FULL, "processes.shard=2", "train.recompute_blocks=2"), "qwenimage"),
        (4, 2, (*LORA, "processes.shard=0"), "qwenimage21"),
    ],
)
def test_groups_of_processes_train_as_one(run, count, sequence, settings, family) -> None:
    alone = [each for each in settings if not each.startswith("processes.")]
    many = run("many", count, sequence, settings, family)
    close(many, run("one", 1, 1, alone, family), CLOSE)


@pytest.mark.slow
def test_edits_are_shared_too(run) -> None:
    recipe = Path(__file__).parents[1] / "configs" / "tiny_edit.yaml"
    few = ["train.steps=2", "data.prompts_per_step=2", "rollout.group_size=4", "evaluation.steps=2"]
    own = [str(recipe), "threads=1", *few, *CHUNKS]
    close(run("two", 2, 2, own), run("one", 1, 1, own), CLOSE)


@pytest.mark.slow
def test_two_runs_in_bfloat16_have_the_same_bits(run) -> None:
    own = (*CHUNKS, "model.dtype=bfloat16")
    found = [run(name, 2, 2, own, "qwenimage") for name in ("first", "again")]
    assert [row["pre_update_ratio_error"] for row in metrics(found[0])] == [0, 0]
    kept = "checkpoints/checkpoint-2/state.safetensors"
    for name in ("metrics.jsonl", kept):
        assert (found[0] / name).read_bytes() == (found[1] / name).read_bytes(), name


@pytest.mark.chaos("kill -9 of one of two processes that share tokens: the other stops")
def test_a_killed_neighbour_stops_the_run_and_one_process_goes_on(run, meddle) -> None:
    """Killed while the update replays, after a whole checkpoint of step 1."""
    one = run("one", 1, 1, LORA)
    hook = meddle("learner.Learner._backward", 3, "os.kill(os.getpid(), signal.SIGKILL)", False)
    hook = "if os.environ['RANK'] == '1':" + "".join(f"\n    {line}" for line in hook.splitlines())
    killed = run("two", 2, 2, LORA, hook=hook, codes=[1, -signal.SIGKILL])
    assert load_checkpoint(killed / "checkpoints" / "latest").step == 1
    close(run("two", 1, 1, (*LORA, "resume=auto")), one, CLOSE)


BOTH = """
import os, signal
from pathlib import Path
pids = Path(FOLDER)
(pids / os.environ["RANK"]).write_text(str(os.getpid()))
def both():
    for rank in ("1", "0") if os.environ["RANK"] == "0" else ():
        os.kill(int((pids / rank).read_text()), signal.SIGTERM)
"""


def test_a_signal_stops_both_and_the_steps_before_are_kept(run, meddle, tmp_path) -> None:
    """In the second rollout: one process stops, the other waits for it in an exchange."""
    sent = meddle("models.sequence.Ulysses.to_heads", 2, "both()", False)
    hook = BOTH.replace("FOLDER", repr(str(tmp_path)))
    hook += meddle("trainer.Trainer.rollout", 2, f"exec({sent!r}, {{'both': both}})", False)
    own = (*LORA, "tracking.checkpoint_every=0")
    stopped = run("two", 2, 2, own, hook=hook, codes=[128 + signal.SIGTERM] * 2)
    assert load_checkpoint(stopped / "checkpoints" / "latest").step == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["rollout.denoise=graphs"], "rollout.denoise: is not served by processes.sequence=2"),
        (["rollout.denoise=compile"], "rollout.denoise: is not served by processes.sequence=2"),
        (["model.fp8={mode: unified}"], "model.fp8: is not served by processes.sequence=2"),
        (["configs/tiny_opd.yaml"], "algorithm.name: is not served by processes.sequence=2"),
        (["processes.sequence=0"], "processes.sequence"),
    ],
)
def test_what_does_not_go_together_is_refused_by_the_recipe(small, settings, said) -> None:
    own = settings if settings[0].endswith(".yaml") else [*small, "processes.sequence=2", *settings]
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config([*own, *(["processes.sequence=2"] if own is settings else [])])


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (1, "processes.sequence: got 2 with 1 processes; wanted a divisor of their number"),
        (3, "processes.sequence: got 2 with 3 processes; wanted a divisor of their number"),
        (6, "got 6 in groups of 2, and a minibatch of 4 samples is drawn in 2 chunks of 2; start "),
    ],
)
def test_numbers_that_do_not_fit_are_refused(small, count, said) -> None:
    cfg = load_config([*small, *CHUNKS, "processes.sequence=2"])
    require_work(cfg, 4)
    with pytest.raises(ConfigError, match=re.escape(said)):
        require_work(cfg, count)


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        (Flux, "the family flux does not share out its tokens; set processes.sequence=1"),
        (QwenImageEdit, "the family qwenimage_edit does not share out its tokens"),
    ],
)
def test_families_that_cannot_are_refused(adapter, said) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        require_sharing(2, adapter, None)


def test_heads_that_do_not_divide_are_refused_and_leave_nothing(processes, small, tmp_path) -> None:
    """The packaged model has three; two processes would divide them."""
    said = "processes.sequence: got 2, and each process gets as many of the 3 heads; allowed: 1, 3"
    own = [*CHUNKS, "processes.sequence=2"]
    runs = processes(2, [*own, f"output={tmp_path}", "run=r"])
    assert ended(runs) == [2, 2] and not (tmp_path / "r").exists()
    assert said in runs[0].output() and runs[1].output() == ""
    with pytest.raises(ConfigError, match=re.escape(said)):
        plan(load_config([*small, *own]), 2)


@pytest.mark.parametrize("family", ["qwenimage", "qwenimage21"])
def test_the_plan_shares_out_activations(small, folders, family) -> None:
    """Prompts are some twenty tokens beside 256: what is not shared is next to nothing."""
    own = [f"model.path={folders(family)}", "rollout={height: 256, width: 256, max_rows: 2}"]

    def planned(count: int, sequence: int) -> dict[str, int]:
        return plan(load_config([*small, *own, f"processes.sequence={sequence}"]), count)

    two, shared = planned(2, 1), planned(4, 2)
    for name in ("recorded states", "gradients", "adapter"):
        assert shared[name] == two[name], name
    assert 2 * shared["images"] == two["images"]
    whole = two["activations of replay"]
    assert 0.5 * whole <= shared["activations of replay"] <= 0.6 * whole
