"""The planned memory against what a run holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import environments

from bench.timing import peak_bytes
from qirl_fast.algorithms import Policy, make_algorithm
from qirl_fast.config import derived, load_config
from qirl_fast.distributed import TreeSum, World
from qirl_fast.memory import IN_TURN, SHARED_OUT, _sums, describe_plan, plan, planned_peak
from qirl_fast.models.qwenimage21 import QwenImage21
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.sample import Sampling, sample
from qirl_fast.rollout.workers import Workers

ONE_CHUNK = (
    "threads=1",
    "data.prompts_per_step=2",
    "rollout.group_size=8",
    "rollout.max_rows=16",
    "rollout.window={start: 0, size: 2}",
)


def replayed(weights: Path, *settings: str):
    """A function that runs the replay of one chunk of the longest prompt and keeps its graph."""
    cfg = load_config([*ONE_CHUNK, *settings])
    model = QwenImage21.load(weights, torch.float32)
    lora = cfg.model.lora
    trainable = model.trainable("lora", lora.rank, lora.alpha, lora.targets, 0)
    prompts = ["a photo of a yellow triangle right of a purple square"] * 2
    r = cfg.rollout
    how = Sampling(
        height=r.height,
        width=r.width,
        steps=r.steps,
        guidance=Guidance(r.guidance, False, r.ratio_mode),
        dynamics=r.dynamics,
        eta=r.eta,
        max_rows=derived(cfg).chunk_rows,
    )
    (chunk,) = sample(
        model,
        model.encode(prompts),
        model.encode([""])[0],
        how,
        dict(model.pipeline.scheduler.config),
        group_size=r.group_size,
        seed=0,
        update=1,
        recorded=(0, 1),
    )
    algorithm = make_algorithm(cfg.algorithm, Policy(model, trainable, how, Workers(1)))
    (prepared,) = algorithm.prepare([chunk], ["t2i"] * 16)
    advantage = torch.randn(16)
    return lambda: [s.loss for s in algorithm.loss(chunk, advantage, prepared)]


@pytest.mark.parametrize("mode", ["frozen_offset", "full"])
def test_activations_are_those_that_autograd_saves(weights: Path, mode: str) -> None:
    """To a fifth: the loss's own tensors and the allocator's losses are not planned."""
    setting = f"rollout.ratio_mode={mode}"
    planned = plan(load_config([*ONE_CHUNK, setting]))
    activations = planned["activations of replay"]
    prefix = planned["keys and values of the prompts"]
    kept = []
    run = replayed(weights, setting)
    peak = peak_bytes(lambda: kept.extend(run()), "cpu")
    assert 0.8 * (activations + prefix) <= peak <= 1.2 * (activations + prefix)


def test_it_follows_the_recipe(weights: Path) -> None:
    base = plan(load_config(list(ONE_CHUNK)))
    rows = {"rollout.group_size=16", "rollout.max_rows=32"}
    twice = plan(load_config([*ONE_CHUNK, *rows]))
    assert twice["activations of replay"] == pytest.approx(
        2 * base["activations of replay"], rel=0.1
    )
    assert twice["recorded states"] == 2 * base["recorded states"]
    half = plan(load_config([*ONE_CHUNK, "model.dtype=bfloat16"]))
    assert 2 * half["weights of transformer"] == base["weights of transformer"]
    assert half["activations of replay"] < 0.7 * base["activations of replay"]
    again = plan(load_config([*ONE_CHUNK, "train.recompute_blocks=4"]))
    assert again["activations of replay"] < 0.3 * base["activations of replay"]
    full = plan(load_config([*ONE_CHUNK, "model.adapter=full"]))
    assert full["gradients"] == full["weights of the reference"] == base["weights of transformer"]
    several = plan(load_config([*ONE_CHUNK, "rollout.max_rows=8"]))
    assert several["gradients"] == 2 * base["gradients"], "a sum, and the next chunk's"
    text = describe_plan(base)
    total = sum(base.values()) / 2**20
    assert text.startswith("# planned memory\n") and f"{total:,.1f} MiB" in text.splitlines()[-1]


def test_no_weight_is_read(model_copy: Path) -> None:
    base = plan(load_config(list(ONE_CHUNK)))
    for file in model_copy.rglob("*.safetensors"):
        file.write_bytes(b"no weights")
    assert plan(load_config([*ONE_CHUNK, f"model.path={model_copy}"])) == base


def test_the_template_is_counted_as_the_encoder_sees_it(weights: Path) -> None:
    model = QwenImage21.load(weights, torch.float32)
    for prompt in ("a photo of a red circle", "a photo of a yellow triangle right of a square"):
        (embedding,) = model.encode([prompt])
        assert len(embedding) == QwenImage21.prompt_tokens(weights, prompt)


# Instead of training: two updates, of which the second is measured, all optimizer state there.
MEASURED = """
import json, os
from pathlib import Path
from bench.timing import peak_bytes
import qirl_fast.train
os.environ.update(ENVIRONMENT)

def loop(trainer, step, cfg, run_dir):
    def update(number):
        batch = trainer.rollout(trainer.next_prompts(), number)
        trainer.update(batch, trainer.advantages(batch))
    update(1)
    learner, found = trainer.learner, {}
    found["peak"] = peak_bytes(lambda: update(2), "cpu")
    state = [t for s in learner.optimizer.state.values() for t in s.values() if t.ndim]
    found["AdamW's two moments"] = sum(t.nbytes for t in state)
    found["average of the weights"] = sum(t.nbytes for t in learner.ema.average)
    frozen = [p for p in trainer.model.transformer.parameters() if not p.requires_grad]
    found["weights of transformer"] = sum(p.nbytes for p in frozen)
    found["adapter"] = sum(p.nbytes for p in learner.trainable.values())
    Path(OUT).write_text(json.dumps(found))
    return run_dir

qirl_fast.train.loop = loop
"""
# Held before an update begins.
STANDING = ("weights of", "adapter", "AdamW's", "average of")


@pytest.fixture
def measured(start, tmp_path: Path):
    """`measured(processes, settings)`: what each of them held."""

    def run(processes: int, settings: Sequence[str]) -> list[dict[str, Any]]:
        with environments(processes) as told:
            runs = []
            for rank, own in enumerate(told):
                names = {"ENVIRONMENT": own, "OUT": str(tmp_path / f"{rank}.json")}
                hook = "".join(f"{name} = {value!r}\n" for name, value in names.items()) + MEASURED
                runs.append(start(settings, paths=[Path(__file__).parents[1]], hook=hook))
            for each in runs:
                assert each.wait() == 0, each.output()
        return [json.loads((tmp_path / f"{r}.json").read_text()) for r in range(processes)]

    return run


@pytest.mark.parametrize("rank", [8, 1024], ids=["activations", "gradients"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_holds_what_is_planned(
    measured, small, tmp_path: Path, processes: int, rank: int
) -> None:
    """Rollout and update, four chunks a minibatch; to a fifth. A LoRA of rank 1024 has so many
    weights that what processes send each other is most of it.
    """
    settings = [*small, f"output={tmp_path}", "run=one", "data.prompts_per_step=4"]
    settings += ["rollout.max_rows=4", f"model.lora.rank={rank}", "train.ema={decay: 0.9}"]
    settings.append("train.skip_flat=false")
    planned = plan(load_config(settings), processes)
    for found in measured(processes, settings):
        peak = found.pop("peak")
        assert found == {name: planned[name] for name in found}
        passing = {n: b for n, b in planned.items() if not n.startswith(STANDING)}
        assert 0.8 * planned_peak(passing) <= peak <= 1.2 * planned_peak(passing)


def test_processes_share_out_samples_and_repeat_the_rest() -> None:
    settings = [*ONE_CHUNK, "rollout.max_rows=4"]
    alone, two, three = (plan(load_config(settings), n) for n in (1, 2, 3))
    whole = [name for name in alone if name not in (*SHARED_OUT, "gradients")]
    assert {n: two[n] for n in whole} == {n: alone[n] for n in whole}
    for name in ("recorded states", "images"):
        assert 2 * two[name] == alone[name] and three[name] == two[name], "4 chunks: 2, 1, 1"
    assert set(two) - set(alone) == {"exchange of gradients"} == set(IN_TURN[1])
    text = describe_plan(two, 2)
    assert text.startswith("# planned memory, each of 2 processes\n")
    shared = [line for line in text.splitlines() if line.endswith("its share")]
    assert len(shared) == sum(two.get(name, 0) > 0 for name in SHARED_OUT) == 2


@pytest.mark.parametrize("chunks", range(1, 18))
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_sums_are_those_that_a_process_holds(chunks: int, size: int) -> None:
    for rank in range(size):
        tree, counts, share = TreeSum(), [0], World(rank, size).own(chunks)
        for leaf in share:
            tree.add(leaf, [torch.zeros(1)])
            counts.append(len(tree.nodes))
        assert _sums(share) == counts


def test_a_dry_run_speaks_for_the_processes_it_is_started_in(start, small) -> None:
    def dry(rank: int, processes: int, *more: str) -> Any:
        told = {"WORLD_SIZE": str(processes), "RANK": str(rank)}
        own = [*small, "rollout.max_rows=2", *more, "--dry-run"]
        run = start(own, hook=f"os.environ.update({told})")
        run.wait()
        return run

    first, second, idle = dry(0, 2), dry(1, 2), dry(0, 5)
    judging = dry(0, 5, "processes.rewards=1")
    assert first.wait() == 0 and "each of 2 processes" in first.output()
    assert judging.wait() == 0 and "each of 4 processes" in judging.output()
    assert second.wait() == 0 and second.output() == ""
    assert idle.wait() == 2 and "in 4 chunks of 2; start at most 4" in idle.output()
