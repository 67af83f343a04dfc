"""Compiled blocks: the numbers of eager to rounding, bounded, and never at a step that is scored.

Tolerance: 3e-6 of the largest value in float32, as between two orders of a sum of some hundred
terms (test_qwenimage21.py). Most tests trace with the backend aot_eager, which needs no C++.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from qirl_fast.config import ConfigError, load_config
from qirl_fast.models.compiled import CompiledForward
from qirl_fast.models.fused import attention
from qirl_fast.models.qwenimage21 import QwenImage21
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.replay import replay
from qirl_fast.rollout.sample import Sampling, sample_then
from qirl_fast.rollout.workers import Workers

SIZE = 64
CLOSE = 3e-6


def noise(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 16, 16, generator=torch.Generator().manual_seed(seed))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture
def model(make_model) -> QwenImage21:
    """With a LoRA off its start, traced."""
    model = make_model()
    with torch.no_grad():
        for p in model.trainable("lora", 4, 8, None, 0).values():
            p.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    model.denoiser = CompiledForward(model.transformer, model.forward, "aot_eager")
    return model


def both(model: QwenImage21, x: Tensor, levels: Any, prefix: Any) -> tuple[Tensor, Tensor]:
    """(compiled, eager) velocities."""
    with torch.no_grad():
        return model.velocity(x, levels, prefix, False), model.velocity(x, levels, prefix)


def test_blocks_share_code_and_layouts_have_their_own(model, prompts) -> None:
    """Traced once for all blocks of a layout; other inputs and weights of it trace nothing more."""
    traced: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.append(graph)
        return graph.forward

    model.denoiser = CompiledForward(model.transformer, model.forward, backend)
    traced.clear()
    text = model.encode([*prompts, ""])
    with torch.no_grad():
        mixed = model.prefix(text, [2, 0, 1, 0], SIZE, SIZE)
        null = model.prefix([text[-1]], [0] * 4, SIZE, SIZE)
        cases = [(4, mixed), (4, null), (8, model.join(mixed, null))]
    for update in range(2):
        for seed, level in ((0, 0.9), (1, 0.3)):
            for rows, prefix in cases:
                quick, eager = both(model, noise(rows, seed), [level], prefix)
                assert relative(quick, eager) < CLOSE
        assert len(traced) == model.denoiser.compiled == 3, update
        with torch.no_grad():
            torch._foreach_add_([p for p in model.transformer.parameters() if p.requires_grad], 0.1)
    with model.reference():
        assert relative(*both(model, noise(4), [0.9], null)) < CLOSE
    assert len(traced) == 4, "without the adapter it is another computation"
    assert relative(*both(model, noise(4), [0.9], null)) < CLOSE and len(traced) == 4


def test_the_layout_longest_unused_goes(model, prompts) -> None:
    """Any number of resolutions: KEPT of them at a time, and Dynamo's own limit is not met."""
    model.denoiser.KEPT = 2
    sizes = [(64, 32 * n) for n in range(1, 13)]  # more than Dynamo keeps of one function
    text = model.encode(prompts[:1])
    for k, size in enumerate(sizes):
        with torch.no_grad():
            prefix = model.prefix(text, [0], *size)
        x = torch.randn(1, model.latent_shape(*size)[0], 16)
        assert relative(*both(model, x, [0.9], prefix)) < CLOSE
        assert model.denoiser.compiled == k + 1 and len(model.denoiser._kept) == min(2, k + 1)
    both(model, x, [0.9], prefix)
    assert model.denoiser.compiled == len(sizes)


@pytest.mark.parametrize("mode", ["frozen_offset", "conditional", "full"])
def test_a_rollout_scores_what_replay_scores(model, prompts, mode: str) -> None:
    """Compiled where nothing is scored; a ratio of 1 to the bit. Two threads, one compilation."""
    text, null = model.encode(prompts[:2]), model.encode([""])[0]
    how = Sampling(SIZE, SIZE, 5, Guidance(2.0, False, mode), "flow_sde", max_rows=2)
    compiled, found, config = model.denoiser, [], model.pipeline.scheduler.config
    for model.denoiser in (compiled, None):
        given = (lambda chunk: chunk, Workers(2), model, text, null, how, config)
        chunks = sample_then(*given, group_size=4, seed=0, update=1, recorded=(0, 1))
        found.append(list(chunks))
    layouts = {tuple(len(e) for e in chunk.prompts.embeddings) for chunk in found[0]}
    assert compiled.compiled == len(layouts)
    for quick, eager in zip(*found, strict=True):
        for k in (0, 1):
            assert torch.equal(quick.x[k], eager.x[k]) and torch.equal(quick.logp[k], eager.logp[k])
        assert 0 <= relative(quick.latents, eager.latents) < 10 * CLOSE  # three guided steps
        for step in replay(model, quick, how):
            assert step.logp.requires_grad and torch.equal(step.logp, step.logp_old)


def test_inductor_agrees_in_both_dtypes(make_model, prompts, caplog) -> None:
    """bfloat16: an error against float32 at most twice eager's own."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(dtype)
        with caplog.at_level(logging.INFO, logger="qirl_fast"):
            model.denoiser = CompiledForward(model.transformer, model.forward)
            with torch.no_grad():
                prefix = model.prefix(model.encode(prompts[:1]), [0, 0], SIZE, SIZE)
            found[dtype] = [v.float() for v in both(model, noise(2), [0.7], prefix)]
    quick, exact = found[torch.float32]
    assert relative(quick, exact) < CLOSE
    error, own = ((v - exact).square().mean().sqrt().item() for v in found[torch.bfloat16])
    assert error <= 2 * own
    assert "compiled the blocks for 2 rows of 16 tokens in" in caplog.text


def broken(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler\nat all")


def test_what_cannot_compile_is_refused(model, prompts, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"torch\.compile does not work here \(.*no compiler"):
        CompiledForward(model.transformer, model.forward, broken)
    prefix = model.prefix(model.encode(prompts[:1]), [0], SIZE, SIZE)
    hook = model.transformer.transformer_blocks[1].register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"would leave out the hooks .*set rollout\.denoise="):
        both(model, noise(1), [0.7], prefix)
    hook.remove()
    dispatch = attention.dispatch_attention_fn

    def breaks(*args: Any, **settings: Any) -> Tensor:
        torch._dynamo.graph_break()
        return dispatch(*args, **settings)

    monkeypatch.setattr(attention, "dispatch_attention_fn", breaks)
    with pytest.raises(ValueError, match=r"cannot compile the blocks .*set rollout\.denoise=eager"):
        both(model, noise(1), [0.7], prefix)
    te = ["model.fp8={mode: explore, library: te, keep: 2}", "model.fp8.recipe=tensor"]
    with pytest.raises(ConfigError, match=r"rollout\.denoise: got compile, which cannot look into"):
        load_config([*te, "rollout.denoise=compile"])


def test_a_run_compiles(start, small, tmp_path, read_jsonl) -> None:
    run = start([*small, f"output={tmp_path}", "run=one", "rollout.denoise=compile"])
    assert run.wait() == 0, run.output()
    rows = [r for r in read_jsonl(tmp_path / "one/metrics.jsonl") if "grad_norm" in r]
    assert len(rows) == 2 and all(row["pre_update_ratio_error"] == 0 for row in rows)
    log = (tmp_path / "one/log.txt").read_text()
    assert "denoising: compile" in log and "compiled the blocks for" in log
