"""The ops against values recorded from rival trainers' own functions, on every backend.

tests/golden/peers_golden.npz holds float32 tensors: flow_grpo's SDE and CPS steps and DanceGRPO's
step at nine steps of a ten-step schedule (24 tokens of 16, 2 rows; the recorded gradient is that of
0.5 logp[0] + 1.5 logp[1]), flow_grpo's and UniRL's advantages, the clipped GRPO loss,
DiffusionNFT's loss, and diffusers' true CFG with and without the norm rescale.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from qirl_fast import ops
from qirl_fast.rollout.dynamics import StepCoefficients, step_coefficients
from qirl_fast.rollout.schedule import make_sigmas, make_timesteps, shift_mu

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "peers_golden.npz"))
BACKENDS = ["reference", "cpu"]
DYNAMICS = {"sde": "flow_sde", "cps": "cps", "dance": "dance_sde"}
STEPS = range(9)
QWEN = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}


def tensor(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def coefficients(peer: str, step: int) -> StepCoefficients:
    sigmas = GOLDEN["sigmas"].astype(np.float64)
    eta = float(GOLDEN[f"{peer}_{step}_noise_level"])
    return step_coefficients(
        DYNAMICS[peer], sigmas[step], sigmas[step + 1], eta=eta, sigma_max=sigmas[1]
    )


def both_rows(value: float) -> Tensor:
    return torch.full((2,), value, dtype=torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("peer", list(DYNAMICS))
def test_step_log_prob_and_gradient(peer: str, step: int, backend: str) -> None:
    x, v, x_next, logp, dv = (
        tensor(f"{peer}_{step}_{part}") for part in ("x", "v", "next", "logp", "dv")
    )
    k = coefficients(peer, step)
    v = v.clone().requires_grad_()
    with ops.use_backend(backend):
        ours = ops.flow_logp(x, x_next, v, *map(both_rows, (k.a, k.c, k.w, k.b)))
        (ours * torch.tensor([0.5, 1.5])).sum().backward()
    # 2e-7 where the terms are of order one. DanceGRPO adds log s = -2.2 in float32, whose ulp is
    # 2.4e-7: its own values are off by 2.03e-7 from the float64 formula, so there 2e-7 is taken of
    # log s, and the formula itself bounds us: one ulp of a number in [1, 2).
    exact = -k.w * (x_next.double() - k.a * x.double() - k.c * v.detach().double()) ** 2
    exact = exact.mean((1, 2)) - k.b
    torch.testing.assert_close(ours.detach().double(), exact, rtol=0, atol=2**-23)
    scale = max(1.0, abs(math.log(k.s))) if peer == "dance" else 1.0
    torch.testing.assert_close(ours.detach(), logp, rtol=0, atol=2e-7 * scale)
    assert v.grad is not None
    torch.testing.assert_close(v.grad, dv, rtol=0, atol=1e-6)
    # These gradients are 1e-5 to 1e-2, so 1e-6 alone says little. Relative to their norm the error
    # is that of the float32 residual x' - mean, of rms s: 2^-24 |x'| / s, |x'| being 1 to 3.
    assert float((v.grad - dv).norm() / dv.norm()) < 3 * 2**-24 / k.s + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("peer", ["sde", "cps"])
def test_step_mean(peer: str, step: int, backend: str) -> None:
    """Without noise the next sample is the mean."""
    k = coefficients(peer, step)
    columns = map(both_rows, (k.a, k.c, 0.0, 0.0, 0.0))
    with ops.use_backend(backend):
        mean, logp = ops.flow_step(
            tensor(f"{peer}_{step}_x"),
            tensor(f"{peer}_{step}_v"),
            *columns,
            seed=torch.tensor([1, 2]),
            offset=step,
        )
    torch.testing.assert_close(mean, tensor(f"{peer}_{step}_mean"), rtol=0, atol=1e-6)
    assert (logp == 0).all()


def test_schedule() -> None:
    steps, tokens = int(GOLDEN["num_steps"]), int(GOLDEN["image_seq_len"])
    sigmas = make_sigmas(steps, tokens, QWEN)
    np.testing.assert_array_equal(sigmas.astype(np.float32), GOLDEN["sigmas"])
    np.testing.assert_array_equal(make_timesteps(sigmas, QWEN), GOLDEN["timesteps"])
    # The recorded mu adds its terms in another order: an ulp.
    assert shift_mu(tokens, QWEN) == pytest.approx(float(GOLDEN["mu"]), rel=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adv_flow_grpo_global", {"std": "global", "ddof": 0, "eps": 1e-4, "mode": "sum_first"}),
        ("adv_flow_grpo_group", {"std": "group", "ddof": 0, "eps": 1e-4, "mode": "sum_first"}),
        ("adv_unirl_group", {"std": "group", "ddof": 1, "eps": 1e-8}),
    ],
)
def test_advantages(name: str, options: dict[str, object], backend: str) -> None:
    wanted = tensor(name)
    rewards = tensor("adv_rewards")[:, None]
    with ops.use_backend(backend):
        out = ops.group_advantage(
            rewards, tensor("adv_group"), torch.ones(1), clamp=None, **options
        )
    if wanted.dtype == torch.float64:
        torch.testing.assert_close(out.advantage, wanted, rtol=1e-6, atol=0)
        return
    # UniRL subtracts in float32: an ulp of a reward is 1e-6 of a small deviation, so 1e-6 is
    # taken of the largest advantage, as the error of a difference is that of its operands.
    error = (out.advantage - wanted.double()).abs().max()
    assert float(error) <= 1e-6 * float(wanted.abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
def test_grpo_loss(backend: str) -> None:
    logp = tensor("grpo_logp").clone().requires_grad_()
    clip = float(GOLDEN["grpo_clip"])
    with ops.use_backend(backend):
        out = ops.policy_loss(
            logp, tensor("grpo_old"), tensor("grpo_adv"), clip_low=clip, clip_high=clip
        )
    out.loss.backward()
    assert float(out.loss.detach()) == pytest.approx(float(GOLDEN["grpo_loss"]), rel=1e-6)
    torch.testing.assert_close(logp.grad, tensor("grpo_dlogp"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "rescale"), [("cfg_plain", False), ("cfg_rescaled", True)])
@pytest.mark.parametrize("per_row", [False, True])
def test_guidance(name: str, rescale: bool, per_row: bool, backend: str) -> None:
    scale = float(GOLDEN["cfg_scale"])
    with ops.use_backend(backend):
        v = ops.guide(
            tensor("cfg_cond"),
            tensor("cfg_uncond"),
            torch.full((3,), scale) if per_row else scale,
            rescale=rescale,
        )
    torch.testing.assert_close(v, tensor(name), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nft_loss(backend: str) -> None:
    v = tensor("nft_v").clone().requires_grad_()
    adv_clip = float(GOLDEN["nft_adv_clip_max"])
    with ops.use_backend(backend):
        out = ops.nft_loss(
            v,
            tensor("nft_old"),
            tensor("nft_xt"),
            tensor("nft_x0"),
            tensor("nft_t"),
            (2 * tensor("nft_reward_prob") - 1) * adv_clip,
            beta=float(GOLDEN["nft_beta"]),
            v_ref=tensor("nft_ref"),
            adv_clip=adv_clip,
            ref_weight=float(GOLDEN["nft_kl"]),
        )
    out.loss.backward()
    assert float(out.loss.detach()) == pytest.approx(float(GOLDEN["nft_loss"]), rel=2e-7)
    torch.testing.assert_close(v.grad, tensor("nft_dv"), rtol=1e-6, atol=1e-8)
