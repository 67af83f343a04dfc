"""Recorded forwards: their inputs arrive, and what a graph depends on gets another graph.

On a CPU the recording is a stand-in that reads and writes the same fixed tensors: a run whose
output is copied to one place. The last test records true CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qirl_fast import ops
from qirl_fast.models.fused.attention import use_attention
from qirl_fast.models.graphs import ForwardGraphs
from qirl_fast.models.qwenimage21 import QwenImage21
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.sample import Sampling, sample

SIZE = 64


class Recorder:
    """Stands in for capture_cuda; `recorded` counts the graphs."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        out = torch.full_like(run(), torch.nan)

        def replay() -> None:
            out.copy_(run())

        return replay, out


def noise(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def recorded(make_model) -> tuple[QwenImage21, Recorder]:
    """A model with a LoRA off its start, whose forwards go through the stand-in."""
    model, recorder = make_model(), Recorder()
    with torch.no_grad():
        for p in model.trainable("lora", 4, 8, None, 0).values():
            p.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    model.denoiser = ForwardGraphs(model.transformer, model.forward, recorder)
    return model, recorder


def both(model: QwenImage21, *args: Any) -> tuple[Tensor, Tensor]:
    """(replayed, computed) velocities."""
    graphs = model.denoiser
    with torch.no_grad():
        replayed = model.velocity(*args)
        model.denoiser = None
        computed = model.velocity(*args)
    model.denoiser = graphs
    return replayed, computed


def test_inputs_reach_the_recorded_tensors(recorded, prompts) -> None:
    """Other latents, noise levels and prompts of the same shapes: one graph; bit for bit."""
    model, recorder = recorded
    with torch.no_grad():
        text = model.encode(["a red circle", "a red square"])
        prefixes = [model.prefix([t], [0, 0], SIZE, SIZE) for t in text]
    kept = []
    for prefix in (prefixes[0], prefixes[1], prefixes[0]):
        for seed, level in ((0, 0.9), (1, 0.9), (0, 0.3)):
            replayed, computed = both(model, noise(2, seed), [level], prefix)
            assert torch.equal(replayed, computed)
            kept.append((replayed, computed))
    assert recorder.recorded == 1
    assert all(torch.equal(a, b) for a, b in kept), "an output is the caller's own"
    in_place = noise(2)
    first, _ = both(model, in_place, [0.5], prefixes[0])
    second, computed = both(model, in_place.mul_(2), [0.5], prefixes[0])
    assert torch.equal(second, computed) and not torch.equal(first, second)


def test_other_shapes_get_their_own_graph(recorded, prompts) -> None:
    """Texts of several lengths, joined branches, several levels, another image size."""
    model, recorder = recorded
    with torch.no_grad():
        text = model.encode([*prompts, ""])
        mixed = model.prefix(text, [2, 0, 1, 0], SIZE, SIZE)
        null = model.prefix([text[-1]], [0] * 4, SIZE, SIZE)
        joined = model.join(mixed, null)
    for _ in range(2):
        for rows, levels, prefix in (
            (4, [0.7], mixed),
            (4, [0.7, 0.2], mixed),
            (4, [0.7], null),
            (8, [0.7], joined),
        ):
            assert torch.equal(*both(model, noise(rows), levels, prefix))
    assert recorder.recorded == 4


def test_weights_and_adapters_are_part_of_a_graph(recorded, prompts) -> None:
    model, recorder = recorded
    text = model.encode(prompts[:1])

    def check(graphs: int) -> Tensor:
        with torch.no_grad():
            prefix = model.prefix(text, [0, 0], SIZE, SIZE)
        replayed, computed = both(model, noise(2), [0.7], prefix)
        assert torch.equal(replayed, computed) and recorder.recorded == graphs
        return replayed

    first = check(1)
    trained = [p for p in model.transformer.parameters() if p.requires_grad]
    with torch.no_grad():
        torch._foreach_add_(trained, 0.05)
    assert not torch.equal(check(1), first), "an update in place needs no new graph"
    with model.reference():
        untrained = check(2)
    assert not torch.equal(untrained, first)
    check(2)
    trained[0].data = trained[0].data * 2
    check(3)
    with ops.use_backend("reference"):
        check(4)
    use_attention(model.transformer, "sdpa")
    check(5)
    with torch.no_grad():
        prefix = model.prefix(text, [0], SIZE, SIZE)
    with torch.inference_mode():
        first = model.velocity(noise(1), [0.7], prefix).clone()
    assert torch.equal(first, both(model, noise(1), [0.7], prefix)[0]) and recorder.recorded == 6


def test_the_oldest_graph_goes(recorded, prompts) -> None:
    model, recorder = recorded
    model.denoiser.KEPT = 2
    with torch.no_grad():
        text = model.encode(prompts[:1])
        prefixes = {n: model.prefix(text, [0] * n, SIZE, SIZE) for n in (1, 2, 3)}
    for n, graphs in ((1, 1), (2, 2), (1, 2), (3, 3), (1, 3), (2, 4)):
        assert torch.equal(*both(model, noise(n), [0.7], prefixes[n]))
        assert recorder.recorded == graphs
    with torch.enable_grad():
        model.velocity(noise(1), [0.7], prefixes[1])
    assert recorder.recorded == 4, "with gradient nothing is replayed"


@pytest.mark.parametrize("mode", ["frozen_offset", "full"])
def test_a_rollout_is_the_same_to_the_bit(recorded, prompts, mode: str) -> None:
    model, recorder = recorded
    with torch.no_grad():
        text, null = model.encode(prompts[:2]), model.encode([""])[0]
    how = Sampling(SIZE, SIZE, 5, Guidance(2.0, False, mode), "flow_sde", max_rows=3)
    graphs, found = model.denoiser, []
    for model.denoiser in (graphs, None):
        config = model.pipeline.scheduler.config
        settings = {"group_size": 3, "seed": 0, "update": 1, "recorded": (0, 1)}
        found.append(list(sample(model, text, null, how, config, **settings)))
    assert 0 < recorder.recorded < 5, "steps share their graphs"
    for a, b in zip(*found, strict=True):
        assert torch.equal(a.latents, b.latents)
        assert all(map(torch.equal, a.logp, b.logp)) and all(map(torch.equal, a.x, b.x))


def test_a_cpu_run_that_asks_for_graphs_is_refused(start, small, tmp_path) -> None:
    run = start([*small, f"output={tmp_path}", "run=one", "rollout.denoise=graphs"])
    assert run.wait() == 2
    assert "rollout.denoise: got graphs, and the run is on the CPU" in run.output()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graphs_replay_what_was_recorded(weights, prompts) -> None:
    model = QwenImage21.load(weights, torch.bfloat16, "cuda")
    model.denoiser = ForwardGraphs(model.transformer, model.forward)
    with torch.no_grad():
        text = model.encode([*prompts, ""])
        for owner in ([0, 0, 0], [2, 0, 1], [1, 1, 1]):
            prefix = model.prefix(text, owner, SIZE, SIZE)
            for seed, level in ((0, 0.9), (1, 0.4)):
                x = noise(3, seed).cuda()
                assert torch.equal(*both(model, x, [level], prefix))


def test_what_is_forgotten_is_recorded_again(recorded) -> None:
    model, recorder = recorded
    prefix = model.prefix(model.encode(["a red circle"]), [0, 0], SIZE, SIZE)
    first, _ = both(model, noise(2), [0.5], prefix)
    model.denoiser.forget()
    again, computed = both(model, noise(2), [0.5], prefix)
    assert recorder.recorded == 2
    assert torch.equal(again, computed) and torch.equal(again, first)
