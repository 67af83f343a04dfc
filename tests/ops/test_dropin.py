"""The ops in place of the code that users have: a diffusers scheduler's loop, a PEFT layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.cases import CASES, DIT_SHAPE, RL_SHAPE, Make
from bench.check import results
from qirl_fast import ops
from qirl_fast.compat.flow_grpo import sde_step_with_logprob

STEPS = 8


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Qwen-Image's schedule."""
    made = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )
    made.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS).tolist(), mu=0.7)
    return made


def velocity(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x + t / 1000)


def noise(dtype: torch.dtype) -> Tensor:
    return torch.randn(3, 64, 16, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flow_step_takes_the_place_of_scheduler_step(dtype):
    """An ODE step: a = 1, c = the difference of sigmas, no noise. Each step from the same x."""
    stock, x = scheduler(), noise(dtype)
    seed = torch.arange(3)
    for i, t in enumerate(stock.timesteps):
        v = velocity(x, t)
        ones, zeros = torch.ones(3), torch.zeros(3)
        step = (stock.sigmas[i + 1] - stock.sigmas[i]).expand(3)
        ours, logp = ops.flow_step(x, v, ones, step, zeros, zeros, zeros, seed=seed, offset=i)
        theirs = stock.step(v, t, x, return_dict=False)[0]
        # In float32 product and sum are rounded alike. In bfloat16 diffusers rounds the product of
        # step and velocity to storage first.
        if dtype == torch.float32:
            assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-9)
        assert torch.equal(logp, zeros)
        x = theirs


def test_a_whole_float32_loop_has_the_same_bits():
    stock = scheduler()
    x = y = noise(torch.float32)
    ones, zeros, seed = torch.ones(3), torch.zeros(3), torch.arange(3)
    for i, t in enumerate(stock.timesteps):
        x = stock.step(velocity(x, t), t, x, return_dict=False)[0]
        step = (stock.sigmas[i + 1] - stock.sigmas[i]).expand(3)
        y, _ = ops.flow_step(
            y, velocity(y, t), ones, step, zeros, zeros, zeros, seed=seed, offset=i
        )
    assert torch.equal(x, y)


def test_an_sde_loop_replays_to_the_log_probabilities_it_sampled():
    """flow_grpo's function on diffusers' scheduler: sample, then score what was stored."""
    stock, x = scheduler(), noise(torch.float32)
    generator, stored = torch.Generator().manual_seed(1), []
    for t in stock.timesteps[:-1]:
        v = velocity(x, t)
        x_next, logp, _, _ = sde_step_with_logprob(
            stock, v, t.reshape(1), x, noise_level=0.7, generator=generator
        )
        stored.append((t, x, v, x_next, logp))
        x = x_next
    for t, x, v, x_next, logp in stored:
        v = v.clone().requires_grad_()
        _, again, _, _ = sde_step_with_logprob(
            stock, v, t.reshape(1), x, noise_level=0.7, prev_sample=x_next
        )
        assert torch.equal(again, logp)
        (gradient,) = torch.autograd.grad(again.sum(), v)
        assert bool(gradient.abs().sum() > 0)


class Fast(nn.Module):
    """A PEFT LoRA layer whose forward is lora_linear, sharing its parameters."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        peft = self.layer
        adapters = [
            (peft.lora_A[n].weight, peft.lora_B[n].weight, peft.scaling[n])
            for n in peft.active_adapters
        ]
        return ops.lora_linear(x, peft.base_layer.weight, peft.base_layer.bias, adapters)


def test_lora_linear_trains_a_peft_model_as_peft_does():
    """Twenty optimizer steps of two layers, PEFT's and ours: the same losses."""

    def losses(swap: bool) -> list[float]:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(24, 48), nn.SiLU(), nn.Linear(48, 24))
        model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]))
        body = model.base_model.model
        if swap:
            body[0], body[2] = Fast(body[0]), Fast(body[2])
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 4
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        g = torch.Generator().manual_seed(1)
        x, y = torch.randn(64, 24, generator=g), torch.randn(64, 24, generator=g)
        values = []
        for _ in range(20):
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(float(loss.detach()))
        return values

    theirs, ours = losses(swap=False), losses(swap=True)
    assert theirs[-1] < 0.95 * theirs[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)  # float32 rounding, through 20 updates


SMALL = {RL_SHAPE: (2, 16, 64), DIT_SHAPE: (1, 264, 128)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(CASES))
def test_activation_checkpointing_changes_no_bit(name, dtype):
    make_case, shape = CASES[name]
    case = make_case(SMALL.get(shape, shape), Make(dtype, "cpu"))
    plain = results(case, case.ours)
    again = results(case, lambda *given: checkpoint(case.ours, *given, use_reentrant=False))
    assert len(plain) == len(again)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one.float(), other.float())
