"""Rows of the two-stream editing families, of several texts and condition images at once, against
the stock transformer row by row: values, gradients, joined branches, kept modulation, graphs.

Tolerances as in test_qwenimage21.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_transformers import EDITORS, TEXT_WIDTH, edit_folder
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import qirl_fast
from qirl_fast.memory import _without_storage
from qirl_fast.models import adapter_of, load_model
from qirl_fast.models.compiled import CompiledForward
from qirl_fast.models.fp8 import plan_layers, use_fp8
from qirl_fast.models.graphs import ForwardGraphs
from qirl_fast.models.loading import described_model
from qirl_fast.models.prefix import Conditioned
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.replay import replay
from qirl_fast.rollout.sample import Sampling, sample

SIZE, TOKENS, CHANNELS = 64, 16, 16
CLOSE, CLOSE_GRADIENT = 3e-6, 1e-5

# Text tokens and condition grids of each prompt: two share a layout, two a grid alone.
PROMPTS = ((9, ((4, 4),)), (5, ((2, 4), (4, 2))), (9, ((2, 4), (4, 2))), (5, ((2, 4), (4, 2))))
OWNER = [2, 0, 1, 3, 0, 2, 1]
LEVELS = [1.0, 0.9, 0.5, 0.02, 0.3, 0.7, 0.1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> dict[str, Path]:
    return {n: edit_folder(n, weights, tmp_path_factory.mktemp("edit")) for n in EDITORS}


@pytest.fixture
def make(folders: dict[str, Path]) -> Callable[[str], Any]:
    return lambda name: load_model(folders[name], "auto", torch.float32, "cpu")


def relative(a: Tensor, b: Tensor) -> float:
    assert b.abs().max() > 0, "nothing to compare"
    return ((a - b).abs().max() / b.abs().max()).item()


def noise(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(seed))


def edit(length: int, grids: tuple[tuple[int, int], ...], seed: int) -> Conditioned:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(length, TEXT_WIDTH, generator=generator)
    latents = torch.randn(sum(h * w for h, w in grids), CHANNELS, generator=generator)
    return Conditioned(text, torch.zeros(length, dtype=torch.bool), latents, grids)


def edits() -> list[Conditioned]:
    return [edit(*prompt, seed) for seed, prompt in enumerate(PROMPTS)]


def stock_velocity(transformer: Any, x: Tensor, sigma: float, prompt: Conditioned) -> Tensor:
    """One row through the stock forward."""
    out = transformer(
        hidden_states=torch.cat([x, prompt.latents])[None],
        encoder_hidden_states=prompt.text[None],
        timestep=torch.tensor([sigma]),
        img_shapes=[[(1, 4, 4), *((1, h, w) for h, w in prompt.grids)]],
        return_dict=False,
    )[0]
    return out[0, :TOKENS]


@pytest.mark.parametrize("given", ["host levels", "tensor"])
@pytest.mark.parametrize("name", EDITORS)
def test_velocity_and_gradients_are_those_of_the_stock_forward(make, name: str, given: str) -> None:
    """Every parameter's gradient and the condition latents'."""
    x, probe = noise(len(OWNER)), noise(len(OWNER), seed=1)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for fused in (True, False):
        model, prompts = make(name), edits()
        parameters = model.trainable("full", 0, 0.0, None, 0)
        latents = {f"latents {i}": p.latents.requires_grad_() for i, p in enumerate(prompts)}
        if fused:
            sigma = LEVELS if given == "host levels" else torch.tensor(LEVELS)
            v = model.velocity(x, sigma, model.prefix(prompts, OWNER, SIZE, SIZE))
        else:
            t = qirl_fast.unpatch(model.transformer)
            rows = [stock_velocity(t, x[r], LEVELS[r], prompts[p]) for r, p in enumerate(OWNER)]
            v = torch.stack(rows)
        (v * probe).sum().backward()
        leaves = {**parameters, **latents}
        found.append((v, {n: p.grad for n, p in leaves.items() if p.grad is not None}))
    (ours, our_gradients), (theirs, gradients) = found
    for r in range(len(OWNER)):
        assert relative(ours[r], theirs[r]) < CLOSE
    largest = max(g.abs().max().item() for g in gradients.values())
    for n, gradient in gradients.items():
        allowed = CLOSE_GRADIENT * max(gradient.abs().max().item(), 0.05 * largest)
        assert (our_gradients[n] - gradient).abs().max().item() <= allowed, n


@pytest.mark.parametrize("name", EDITORS)
def test_joined_branches_are_the_two_by_themselves(make, name: str) -> None:
    """One group and several, in other orders; the unconditional branch has texts of its own."""
    model = make(name)
    prompts = [*edits(), *(edit(3, grids, 9) for _, grids in PROMPTS)]
    owners = ([0, 0], OWNER, [4 + p for p in OWNER], [3, 2, 2])
    with torch.no_grad():
        prefixes = [model.prefix(prompts, owner, SIZE, SIZE) for owner in owners]
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (3, 0), (0, 3)):
            x = noise(len(owners[a]) + len(owners[b]), seed=a + 7 * b)
            both = model.join(prefixes[a], prefixes[b])
            together = model.velocity(x, [0.7], both)
            parts = zip(x.split([len(owners[a]), len(owners[b])]), (a, b), strict=True)
            alone = torch.cat([model.velocity(p, [0.7], prefixes[k]) for p, k in parts])
            assert relative(together, alone) < CLOSE
            assert len(both.groups) == len({prompts[p].grids for p in owners[a] + owners[b]})
        twice = model.join(prefixes[1], prefixes[1])
        x = noise(2 * len(OWNER))
        parts = zip(x.chunk(2), (0.9, 0.2), strict=True)
        alone = torch.cat([model.velocity(p, [level], prefixes[1]) for p, level in parts])
        assert relative(model.velocity(x, [0.9, 0.2], twice), alone) < CLOSE


def test_the_row_of_t0_is_kept_with_the_others(make) -> None:
    """zero_cond_t under a LoRA: computed once; and condition tokens do take it, the target not."""
    model = make("plus 2511")
    model.trainable("lora", 4, 8, None, 0)
    with torch.no_grad():
        for _ in range(2):
            prefix = model.prefix(edits()[:1], [0, 0], SIZE, SIZE)
            first = model.velocity(noise(2), [0.7], prefix)
    assert model.modulations.computed == 2, "the level and t = 0"
    group = prefix.groups[0]
    assert group.at_t0.tolist() == [False] * TOKENS + [True] * 16
    for block, row in zip(model.transformer.transformer_blocks, group.rows_t0, strict=True):
        temb = model.transformer.time_text_embed(torch.zeros(1), torch.zeros(1))
        assert torch.equal(row, block.img_mod(temb))
    model.transformer.register_to_config(zero_cond_t=False)
    with torch.no_grad():
        other = model.velocity(noise(2), [0.7], model.prefix(edits()[:1], [0, 0], SIZE, SIZE))
    assert relative(other, first) > 0.01


@pytest.mark.parametrize("name", EDITORS)
def test_recomputed_blocks_give_the_same_bits(make, name: str) -> None:
    model = make(name)
    targets = ["attn.to_q", "img_mlp.net.2", "img_mod.1"]
    parameters = list(model.trainable("lora", 4, 8, targets, 0).values())
    found = []
    for blocks in (0, 2, 99):
        model.recompute_blocks = blocks
        prefix = model.prefix(edits(), [0, 1, 2, 0], SIZE, SIZE)
        v = model.velocity(noise(4), [0.7, 0.3], prefix)
        found.append((v, *torch.autograd.grad(v.square().sum(), parameters)))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("name", [*EDITORS, "2.1"])
def test_it_runs_on_tensors_without_values(folders, weights: Path, name: str) -> None:
    """As memory.py plans: rotations are given, and of a prompt the slots alone have values."""
    folder = weights if name == "2.1" else folders[name]
    kind = adapter_of(folder, "auto")
    transformer = described_model(kind.parts["transformer"], folder / "transformer")
    part = torch.nn.Identity()
    part.config = SimpleNamespace(z_dim=CHANNELS)
    model: Any = kind(SimpleNamespace(transformer=transformer, vae=part, text_encoder=part))
    mode, model.device = FakeTensorMode(), torch.device("cpu")
    _without_storage(transformer, mode, model.device)
    slots, width, tokens = torch.zeros(20, dtype=torch.bool), TEXT_WIDTH, 20 + 48
    if name == "2.1":  # 12 of the 20 embeddings stand for the image
        slots[3:15], width, tokens = True, transformer.config.context_in_dim, 8 + 48
    with mode:
        prompt = Conditioned(torch.empty(20, width), slots, torch.empty(48, CHANNELS), ((6, 8),))
        half = transformer.config.attention_head_dim // 2
        model.use_rope(prompt, (4, 4), torch.empty(tokens + TOKENS, half, dtype=torch.complex64))
        prefix = model.prefix([prompt, prompt], [0, 0, 1], SIZE, SIZE)
        v = model.velocity(
            torch.empty(6, TOKENS, CHANNELS), torch.empty(1), model.join(prefix, prefix)
        )
    assert v.shape == (6, TOKENS, CHANNELS)
    assert len({id(t) for t in prefix.tensors}) == len(prefix.tensors) > 0


@pytest.mark.parametrize("name", EDITORS)
def test_graphs_take_prompts_of_the_same_layout(make, name: str) -> None:
    """On a CPU the recording is a run whose output is copied to one place: see test_graphs.py."""
    model, recorded = make(name), []

    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        recorded.append(torch.full_like(run(), torch.nan))
        out = recorded[-1]
        return lambda: out.copy_(run()), out

    def velocities(graphs: Any, prompts: Sequence[Conditioned]) -> list[Tensor]:
        model.denoiser = graphs
        with torch.no_grad():
            prefix = model.prefix(prompts, OWNER, SIZE, SIZE)
            return [
                model.velocity(noise(7, s), [level], prefix) for s, level in ((0, 0.9), (1, 0.2))
            ]

    graphs = ForwardGraphs(model.transformer, model.forward, capture)
    for prompts in (edits(), [edit(*p, seed + 20) for seed, p in enumerate(PROMPTS)]):
        pairs = zip(velocities(graphs, prompts), velocities(None, prompts), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert len(recorded) == 1


@pytest.mark.parametrize("name", EDITORS)
def test_blocks_can_be_compiled(make, name: str) -> None:
    """Rows of three layouts, each with code of its own, in one forward; to rounding."""
    model = make(name)
    model.denoiser = CompiledForward(model.transformer, model.forward, "aot_eager")
    with torch.no_grad():
        prefix = model.prefix(edits(), OWNER, SIZE, SIZE)
        quick, eager = (model.velocity(noise(7), [0.7], prefix, exact) for exact in (False, True))
    assert relative(quick, eager) < CLOSE and model.denoiser.compiled == 1


@pytest.mark.parametrize("name", EDITORS)
def test_fp8_layers_serve_condition_tokens(make, name: str) -> None:
    """One row through fp8 is the row in a batch (scales by token), and close to float32.

    e4m3 has 3 bits of mantissa, 3 percent a product at most; sums and three blocks average that.
    """
    model, prompts = make(name), edits()
    plan = plan_layers(model.transformer, model.fp8_layers, (), "row", "high")
    with torch.no_grad():
        exact = model.velocity(noise(7), [0.7], model.prefix(prompts, OWNER, SIZE, SIZE))
        with use_fp8(model.transformer, plan).on():
            rows = model.velocity(noise(7), [0.7], model.prefix(prompts, OWNER, SIZE, SIZE))
            alone = model.velocity(noise(7)[2:3], [0.7], model.prefix(prompts, [1], SIZE, SIZE))
    assert 1e-4 < relative(rows, exact) < 0.1
    assert relative(alone[0], rows[2]) < 0.1 * relative(rows, exact)


@pytest.mark.parametrize("mode", ["frozen_offset", "full"])
@pytest.mark.parametrize("name", EDITORS)
def test_the_ratio_is_one_before_an_update(make, name: str, mode: str) -> None:
    """Prompts of three layouts in one chunk, LoRA off its start, graph on; bit for bit."""
    model = make(name)
    with torch.no_grad():
        for p in model.trainable("lora", 4, 8, None, 0).values():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    null, config = edit(3, ((2, 4), (4, 2)), 9), model.pipeline.scheduler.config
    for replay_steps in (1, 2):
        how = Sampling(
            *(SIZE, SIZE, 4, Guidance(2.0, True, mode), "flow_sde"), replay_steps=replay_steps
        )
        settings = {"group_size": 2, "seed": 0, "update": 1, "recorded": (0, 1)}
        for chunk in sample(model, edits(), null, how, config, **settings):
            scored = list(replay(model, chunk, how))
            assert len(scored) == 2 and all(step.logp.requires_grad for step in scored)
            for step in scored:  # two steps of a forward are another shape: to rounding
                gap = relative(step.logp, step.logp_old)
                assert gap <= (0 if replay_steps == 1 else CLOSE)
