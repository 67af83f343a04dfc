"""A transformer spread over processes trains as one process does.

A LoRA's gradients never pass through FSDP, so a run is the same to the last bit. Trained weights
that are spread have their gradients added up by FSDP: chunks of a process one after the other, then
the processes, instead of in the order of a tree. Each of these few additions errs by at most 2^-24
of a partial sum; where summands cancel, a sum is off by some 1e-6 of itself. AdamW divides a
gradient by its own size, so weights follow it as closely but where it is next to nothing, and there
they move by lr at most. CLOSE leaves metrics, losses near 0 among them, a hundred times that.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from worlds import close, ended, talk, written

from qirl_fast import export
from qirl_fast.checkpoint import (
    CheckpointError,
    begin_checkpoint,
    fill_from,
    find_latest,
    load_checkpoint,
    unpack,
)
from qirl_fast.checkpoint.shards import read_shards
from qirl_fast.config import ConfigError, load_config
from qirl_fast.data.prompts import load_prompts
from qirl_fast.data.sampler import PromptSampler
from qirl_fast.distributed import World
from qirl_fast.memory import plan
from qirl_fast.preflight import sharding
from qirl_fast.tiny import packaged

CHUNKS = ("rollout.max_rows=1", "train.updates_per_rollout=2", "evaluation.prompts=3")
FULL = (*CHUNKS, "model.adapter=full", "train.lr=0.0005", "train.ema={decay: 0.5, every: 1}")
WEIGHTS = 1e-6


@pytest.mark.parametrize(
    ("count", "shard", "more"),
    [
        (2, 0, ()),
        (2, 2, ("train.recompute_blocks=1", "algorithm.kl_weight=0.1")),
        (2, 0, ("rollout.ratio_mode=full",)),
        pytest.param(3, 0, (), marks=pytest.mark.slow),
        pytest.param(4, 2, (), marks=pytest.mark.slow),
    ],
)
def test_a_lora_on_spread_weights_trains_to_the_same_bits(
    processes, finished, tmp_path, count, shard, more
) -> None:
    own = [*CHUNKS, *more]
    runs = processes(count, [*own, f"processes.shard={shard}", f"output={tmp_path}", "run=r"])
    assert ended(runs) == [0] * count, runs[0].output()
    assert written(tmp_path / "r") == written(finished("lora-" + "-".join(more)[6:30], *own))


FLAT = """
import numpy
def score(images, metadata):
    scores = numpy.linspace(0, 1, len(metadata) + 1)[1:] + images.mean((1, 2, 3)) / 1000
    return [0.5 if row["prompt"] == PROMPT else s for row, s in zip(metadata, scores)]
"""


def test_processes_with_less_to_do_keep_step(processes, tmp_path) -> None:
    """Three chunks of four rows, of one, two and one prompts; those of the first are all flat."""
    rows = load_prompts(packaged("tiny:train"))
    first = next(PromptSampler(rows, 2, 0))
    (tmp_path / "flat.py").write_text(FLAT.replace("PROMPT", repr(first[0].prompt)))
    own = [
        "rollout={group_size: 6, max_rows: 4, guidance: 1}",
        "rewards={alignment: 0, aesthetics: 0, 'flat:score': 1.0}",
    ]
    own += ["evaluation.prompts=2", f"output={tmp_path}"]
    for count, shard in ((1, 1), (2, 0)):
        settings = [*own, f"processes.shard={shard}", f"run=by{count}"]
        runs = processes(count, settings, paths=[tmp_path])
        assert ended(runs) == [0] * count, runs[0].output()
    metrics = [json.loads(t) for t in (tmp_path / "by1/metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["skipped_share"] == 1 / 3
    assert written(tmp_path / "by2") == written(tmp_path / "by1")


@pytest.mark.parametrize(
    ("count", "shard", "more"),
    [
        (2, 0, ("algorithm.kl_weight=0.1",)),
        pytest.param(4, 2, ("algorithm.kl_weight=0.1",), marks=pytest.mark.slow),
        pytest.param(3, 0, ("train.recompute_blocks=2",), marks=pytest.mark.slow),
    ],
)
def test_spread_weights_train_as_whole_ones(
    processes, finished, tmp_path, count, shard, more
) -> None:
    own = [*FULL, *more]
    runs = processes(count, [*own, f"processes.shard={shard}", f"output={tmp_path}", "run=r"])
    assert ended(runs) == [0] * count, runs[0].output()
    close(tmp_path / "r", finished("full-" + more[0], *own), WEIGHTS)
    parts = sorted(p.name for p in (tmp_path / "r/checkpoints/checkpoint-2/shards").iterdir())
    assert parts == [f"part-{k:05}.safetensors" for k in range(shard or count)]


@pytest.mark.parametrize("name", ["nft", "awm"])
def test_a_lagging_policy_is_spread_too(processes, tmp_path, name) -> None:
    recipe = Path(__file__).parents[1] / "configs" / "algorithms" / f"{name}.yaml"
    few = ["rollout.group_size=2", "rollout.max_rows=2", "data.prompts_per_step=4", "train.steps=2"]
    few += ["evaluation={prompts: 2, steps: 2}", "model.adapter=full", "train.lr=0.0005"]
    few += ["threads=1", "algorithm.lag={most: 0.5, rate: 0.2}", "algorithm.ref_weight=0.1"]
    few += ["train.updates_per_rollout=2", "tracking.tensorboard=false", f"output={tmp_path}"]
    for count, shard in ((1, 1), (2, 0)):
        own = [str(recipe), *few, f"processes.shard={shard}", f"run=by{count}"]
        runs = processes(count, own)
        assert ended(runs) == [0] * count, runs[0].output()
    close(tmp_path / "by2", tmp_path / "by1", WEIGHTS)


def state_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, put together."""
    return load_checkpoint(folder / "checkpoints" / f"checkpoint-{step}").tensors


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> dict[str, Path]:
    """Folders of finished runs of two processes, by name."""
    return {"output": tmp_path_factory.mktemp("whole")}


def two(processes, whole_run: dict[str, Path], name: str, *settings: str) -> Path:
    """The folder of a run of FULL in two processes that was left alone."""
    folder = whole_run["output"] / name
    if not folder.exists():
        own = [*FULL, *settings, "processes.shard=0", f"output={folder.parent}", f"run={name}"]
        runs = processes(2, own)
        assert ended(runs) == [0, 0], runs[0].output()
    return folder


def test_a_run_goes_on_from_shards_to_the_same_bits(processes, whole_run, tmp_path) -> None:
    own = [*FULL, "processes.shard=0", f"output={tmp_path}", "run=r", "resume=auto"]
    assert ended(processes(2, [*own, "train.steps=1"])) == [0, 0]
    again = processes(2, own)
    assert ended(again) == [0, 0], again[0].output()
    assert "from step 1 to 2" in again[0].output()
    whole = two(processes, whole_run, "two")
    assert same(state_of(tmp_path / "r", 2), state_of(whole, 2))
    assert (tmp_path / "r/metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 0), (1, 1)), ((1, 1), (2, 0)), pytest.param((2, 0), (4, 2), marks=pytest.mark.slow)],
)
def test_a_run_goes_on_with_another_number_of_processes(
    processes, finished, tmp_path, before, after
) -> None:
    own = [*FULL, f"output={tmp_path}", "run=r", "resume=auto", "algorithm.kl_weight=0.1"]
    for (count, shard), steps in ((before, 1), (after, 2)):
        settings = [*own, f"processes.shard={shard}", f"train.steps={steps}"]
        runs = processes(count, settings)
        assert ended(runs) == [0] * count, runs[0].output()
    assert f"from step {steps - 1} to 2" in runs[0].output()
    close(tmp_path / "r", finished("full-algorithm.kl_weight=0.1", *FULL, own[-1]), WEIGHTS)


MOMENTS = [
    ("saving.write_part", 2, "0", False),
    ("saving.write_part", 2, "1", True),
    ("saving.begin_checkpoint", 2, "0", True),
    ("saving.finish_checkpoint", 2, "0", False),
    ("checkpoint.store._place", 2, "0", False),
    ("checkpoint.store._point_latest", 2, "0", False),
    ("checkpoint.store._prune", 2, "0", True),
    ("learner.Learner._optimizer_step", 4, "1", True),
]


@pytest.mark.chaos("kill -9 while shards are written: only whole checkpoints, the same bits")
@pytest.mark.parametrize(
    ("where", "n", "rank", "after"),
    [MOMENTS[2], *(pytest.param(*m, marks=pytest.mark.slow) for m in MOMENTS[:2] + MOMENTS[3:])],
)
def test_a_kill_leaves_whole_checkpoints_alone(
    processes, whole_run, meddle, tmp_path, where, n, rank, after
) -> None:
    own = [*FULL, "processes.shard=0", "train.steps=3", f"output={tmp_path}", "run=r"]
    hook = meddle(where, n, "os.kill(os.getpid(), signal.SIGKILL)", after)
    killed = processes(2, own, hook=f"if os.environ['RANK'] == '{rank}':" + indented(hook))
    assert ended(killed)[int(rank)] == -signal.SIGKILL and 0 not in ended(killed)
    for path in (tmp_path / "r/checkpoints").glob("checkpoint-*"):
        assert load_checkpoint(path).step in (1, 2)
    again = processes(2, [*own, "resume=auto"])
    assert ended(again) == [0, 0], again[0].output()
    whole = two(processes, whole_run, "three", "train.steps=3")
    assert same(state_of(tmp_path / "r", 3), state_of(whole, 3))
    assert (tmp_path / "r/metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    kept = {p.name for p in (tmp_path / "r/checkpoints").iterdir()}
    assert kept == {"checkpoint-2", "checkpoint-3", "latest"}


def indented(source: str) -> str:
    return "".join(f"\n    {line}" for line in source.strip().splitlines())


def test_a_damaged_shard_is_said_and_the_checkpoint_before_is_used(
    processes, whole_run, tmp_path
) -> None:
    folder = Path(shutil.copytree(two(processes, whole_run, "two"), tmp_path / "r", symlinks=True))
    part = folder / "checkpoints/checkpoint-2/shards/part-00001.safetensors"
    data = bytearray(part.read_bytes())
    data[-5] ^= 1
    part.write_bytes(data)
    said: list[str] = []
    found = find_latest(folder, said.append)
    assert found is not None and found.step == 1
    assert f"{part} is damaged: SHA-256 differs" in said[0]


def test_a_checkpoint_in_parts_exports_as_the_whole_one(processes, whole_run, tmp_path) -> None:
    run = two(processes, whole_run, "two")
    assert export.main([str(run), str(tmp_path / "mine")]) == 0
    found = load_checkpoint(run / "checkpoints" / "latest")
    average = unpack(found.tensors, found.state["tree"])["learner"]["ema"]
    exported = load_file(next((tmp_path / "mine/transformer").glob("*.safetensors")))
    assert len(average) == len(exported)
    own = [t for t in average if t.dim() > 1]
    assert all(any(torch.equal(t, e) for e in exported.values()) for t in own)


def test_the_forward_may_be_in_another_dtype_than_spread_weights(processes, tmp_path) -> None:
    """In bfloat16, whose steps are 2^-8: rollout and replay still agree to the bit."""
    own = [*FULL, "model.dtype=bfloat16", "processes.shard=0", f"output={tmp_path}", "run=r"]
    runs = processes(2, own)
    assert ended(runs) == [0, 0], runs[0].output()
    rows = [json.loads(t) for t in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    assert [row["pre_update_ratio_error"] for row in rows] == [0, 0]
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    weights = [t for n, t in state_of(tmp_path / "r", 2).items() if "/weights/" in n]
    assert all(t.dtype == torch.float32 for t in weights)
    assert any((t != t.bfloat16()).any() for t in weights)  # what they learnt is finer than that


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["processes.offload=true"], "processes.offload: got true, and processes.shard=1 spreads"),
        (["processes.shard=0", "rollout.denoise=graphs"], "rollout.denoise: graphs records the"),
        (["processes.shard=0", "rollout.denoise=compile"], "rollout.denoise: compile leaves out"),
        (["processes.shard=0", "model.fp8={mode: unified}"], "model.fp8: it holds weights of its"),
        (
            ["configs/tiny_opd.yaml", "processes.shard=0"],
            "algorithm.name: opd changes the adapt",
        ),
        (["processes.shard=-1"], "processes.shard"),
    ],
)
def test_what_does_not_go_together_is_refused_by_the_recipe(small, settings, said) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_config(settings if settings[0].endswith(".yaml") else [*small, *settings])


@pytest.mark.parametrize(
    ("count", "settings", "said"),
    [
        (1, ["processes.shard=0"], "processes.shard: got 0 (all) with 1 processes; wanted several"),
        (4, ["processes.shard=3"], "processes.shard: got 3 with 4 processes; wanted several"),
        (2, ["processes.shard=4"], "processes.shard: got 4 with 2 processes; wanted several"),
        (2, ["processes.shard=0", "processes.offload=true"], "processes.offload: got true, and on"),
        (2, ["processes.shard=0", "model.path={}"], "the family flux cannot be spread"),
    ],
)
def test_what_cannot_be_spread_is_refused(small, tmp_path, count, settings, said) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    own = [setting.format(tmp_path) for setting in settings]
    with pytest.raises(ValueError, match=re.escape(said)):
        sharding(load_config([*small, *own]), World(0, count), "cpu")


@pytest.mark.parametrize("ranks", [pytest.param("01", marks=pytest.mark.slow), "1"])
def test_a_signal_ends_a_step_that_all_save(processes, whole_run, meddle, tmp_path, ranks) -> None:
    own = [*FULL, "processes.shard=0", f"output={tmp_path}", "run=r", "train.steps=3"]
    own.append("tracking.checkpoint_every=0")
    hook = meddle("trainer.Trainer.rollout", 2, "os.kill(os.getpid(), signal.SIGTERM)")
    runs = processes(2, own, hook=f"if os.environ['RANK'] in '{ranks}':" + indented(hook))
    assert ended(runs) == [128 + signal.SIGTERM] * 2, runs[0].output()
    assert "; Ctrl-C saves and stops after a step" in runs[0].output()
    said = "stopped by SIGTERM, all steps that were finished saved; to go on"
    assert said in runs[0].output() and "stopped" not in runs[1].output()
    assert load_checkpoint(tmp_path / "r/checkpoints/latest").step == 2
    again = processes(2, [*own, "resume=auto"])
    assert ended(again) == [0, 0], again[0].output()
    whole = two(processes, whole_run, "three", "train.steps=3")
    assert same(state_of(tmp_path / "r", 3), state_of(whole, 3))
    assert (tmp_path / "r/metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_the_plan_shares_out_what_is_spread(small) -> None:
    def planned(*settings: str) -> dict[str, int]:
        return plan(load_config([*small, *CHUNKS, *settings]), 2)

    lora, full = planned(), planned("model.adapter=full", "train.ema={decay: 0.5, every: 1}")
    shared = planned("processes.shard=0")
    transformer = full["weights of transformer"]
    assert shared == {**lora, "own part of the transformer": transformer // 2}
    shared = planned("processes.shard=2", "model.adapter=full", "train.ema={decay: 0.5, every: 1}")
    assert "exchange of gradients" in full and "exchange of gradients" not in shared
    half = -(-transformer // 8)  # of float32 weights, the count
    assert shared["gradients"] == shared["weights of the reference"] == 4 * half
    assert shared["AdamW's two moments"] == 2 * shared["average of the weights"] == 8 * half


def test_a_refusal_leaves_nothing(processes, tmp_path) -> None:
    runs = processes(2, [*CHUNKS, "processes.shard=3", f"output={tmp_path}", "run=r"])
    assert ended(runs) == [2, 2] and not (tmp_path / "r").exists()
    assert "processes.shard: got 3 with 2 processes" in runs[0].output()
    assert runs[1].output() == ""


TALK = """
import sys
from pathlib import Path
import torch
from torch.distributed.tensor import Shard
from qirl_fast.checkpoint.shards import Part, fill_from, write_part
from qirl_fast.distributed import joined
from qirl_fast.models.sharding import spread_as, own_part
from torch.distributed.tensor import distribute_tensor, Replicate

folder, shard, write = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "write"
drawn = torch.Generator().manual_seed(0)
whole = {f"w{n}": torch.randn(n, 3, generator=drawn) for n in (1, 2, 5, 8)}
whole["b"] = torch.randn(7, generator=drawn).bfloat16()
with joined(60, cuda=False) as world:
    mesh = world.mesh(shard, "cpu")
    places = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    spread = {n: distribute_tensor(t, mesh, places, src_data_rank=None) for n, t in whole.items()}
    if write:
        write_part(folder, Part.of(spread))
    else:
        empty = {n: torch.zeros_like(t) for n, t in spread.items()}
        fill_from(folder / "shards", empty)
        assert all(torch.equal(own_part(empty[n]), own_part(spread[n])) for n in whole)
        for n, t in empty.items():
            assert torch.equal(own_part(spread_as(whole[n], t)), own_part(t))
"""


@pytest.mark.slow
@pytest.mark.parametrize("write", [(2, 0), (4, 2)])
def test_parts_are_read_by_any_number_of_processes(tmp_path, write) -> None:
    """Rows that do not divide, fewer of them than processes, and copies among these."""
    (tmp_path / "shards").mkdir()
    talk(write[0], TALK, tmp_path, write[1], "write")
    assert len(list((tmp_path / "shards").iterdir())) == 2
    whole = read_shards(tmp_path / "shards")
    drawn = torch.Generator().manual_seed(0)
    for n in (1, 2, 5, 8):
        assert torch.equal(whole[f"w{n}"], torch.randn(n, 3, generator=drawn))
    assert torch.equal(whole["b"], torch.randn(7, generator=drawn).bfloat16())
    talk(3, TALK, tmp_path, 0, "read")
    with pytest.raises(CheckpointError, match="does not fit this model"):
        fill_from(tmp_path / "shards", {"w5": torch.zeros(4, 3)})
    with pytest.raises(CheckpointError, match="does not fit this model"):
        fill_from(tmp_path / "shards", {"w6": torch.zeros(6, 3)})


def test_too_little_space_for_shards_is_said_before_anything_is_written(tmp_path) -> None:
    with pytest.raises(OSError, match=r"checkpoint-3 takes .* MB and .* MB are free"):
        begin_checkpoint(tmp_path, 3, {}, {}, None, shards=1 << 60)
    assert list((tmp_path / "checkpoints").iterdir()) == []
