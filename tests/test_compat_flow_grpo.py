"""compat.flow_grpo.sde_step_with_logprob: the recorded values of the original, and its contract."""

import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from qirl_fast import ops
from qirl_fast.compat.flow_grpo import sde_step_with_logprob

GOLDEN = dict(np.load(Path(__file__).parent / "golden" / "peers_golden.npz"))
BACKENDS = ["reference", "cpu"]


@pytest.fixture(scope="module")
def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The schedule of the recorded steps."""
    made = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )
    made.set_timesteps(sigmas=np.linspace(1, 0.1, 10).tolist(), mu=float(GOLDEN["mu"]))
    np.testing.assert_array_equal(made.sigmas.numpy(), GOLDEN["sigmas"])
    return made


def recorded(peer: str, step: int, part: str) -> Tensor:
    return torch.from_numpy(GOLDEN[f"{peer}_{step}_{part}"])


def small(rows: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(7)
    return torch.randn(rows, 6, 4, generator=g), torch.randn(rows, 6, 4, generator=g)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", range(9))
@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_recorded_steps(
    scheduler: FlowMatchEulerDiscreteScheduler, sde_type: str, step: int, backend: str
) -> None:
    v = recorded(sde_type, step, "v").clone().requires_grad_()
    x_next = recorded(sde_type, step, "next")
    with ops.use_backend(backend):
        same, logp, mean, _ = sde_step_with_logprob(
            scheduler,
            v,
            scheduler.timesteps[step : step + 1],
            recorded(sde_type, step, "x"),
            noise_level=float(GOLDEN[f"{sde_type}_{step}_noise_level"]),
            prev_sample=x_next,
            sde_type=sde_type,
        )
        (logp * torch.tensor([0.5, 1.5])).sum().backward()
    assert torch.equal(same, x_next)
    torch.testing.assert_close(logp, recorded(sde_type, step, "logp"), rtol=0, atol=2e-7)
    torch.testing.assert_close(mean, recorded(sde_type, step, "mean"), rtol=0, atol=1e-6)
    torch.testing.assert_close(v.grad, recorded(sde_type, step, "dv"), rtol=0, atol=1e-6)


def test_signature_is_theirs() -> None:
    parameters = inspect.signature(sde_step_with_logprob).parameters
    assert list(parameters)[1:] == [
        "model_output",
        "timestep",
        "sample",
        "noise_level",
        "prev_sample",
        "generator",
        "sde_type",
        "return_sqrt_dt",
    ]
    defaults = [parameters[name].default for name in list(parameters)[4:]]
    assert defaults == [0.7, None, None, "sde", False]


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_return_order_and_shapes(scheduler: FlowMatchEulerDiscreteScheduler, sde_type: str) -> None:
    x, v = small()
    sigma, sigma_next, eta = 0.84604853, 0.75898176, 0.7
    out = sde_step_with_logprob(
        scheduler, v, scheduler.timesteps[2], x, eta, sde_type=sde_type, return_sqrt_dt=True
    )
    prev_sample, logp, mean, std, sqrt_dt = out
    assert [t.shape for t in out] == [x.shape, (3,), x.shape, (1, 1, 1), (1, 1, 1)]
    assert {t.dtype for t in out} == {torch.float32}
    root = math.sqrt(sigma - sigma_next)
    wanted = (
        eta * math.sqrt(sigma / (1 - sigma))
        if sde_type == "sde"
        else sigma_next * math.sin(eta * math.pi / 2)
    )
    # The sigmas above carry eight digits.
    assert float(sqrt_dt) == pytest.approx(root, rel=1e-6)
    assert float(std) == pytest.approx(wanted, rel=1e-6)
    # Noise of 24 numbers a row has a mean square of 1 within a few sixths: it is at that scale.
    noise = (prev_sample - mean) / (std * sqrt_dt if sde_type == "sde" else std)
    assert 0.5 < float(noise.square().mean()) < 1.7
    without = sde_step_with_logprob(
        scheduler, v, scheduler.timesteps[2], x, eta, prev_sample=prev_sample, sde_type=sde_type
    )
    assert len(without) == 4
    assert torch.equal(without[1], logp) and torch.equal(without[2], mean)


def test_rows_at_their_own_timesteps(scheduler: FlowMatchEulerDiscreteScheduler) -> None:
    x, v = small(rows=4)
    which = [0, 5, 8, 5]
    nxt = x + 0.1
    together = sde_step_with_logprob(
        scheduler, v, scheduler.timesteps[which], x, prev_sample=nxt, return_sqrt_dt=True
    )
    assert together[3].shape == (4, 1, 1)
    for row, step in enumerate(which):
        at = slice(row, row + 1)
        alone = sde_step_with_logprob(
            scheduler,
            v[at],
            float(scheduler.timesteps[step]),
            x[at],
            prev_sample=nxt[at],
            return_sqrt_dt=True,
        )
        assert all(torch.equal(a[at], b) for a, b in zip(together, alone, strict=True))


def test_generator_decides_the_noise(scheduler: FlowMatchEulerDiscreteScheduler) -> None:
    x, v = small()
    t = scheduler.timesteps[1:2]

    def draw(seed: int, times: int = 1) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return [sde_step_with_logprob(scheduler, v, t, x, generator=g)[0] for _ in range(times)][-1]

    assert torch.equal(draw(0), draw(0)) and torch.equal(draw(0, 2), draw(0, 2))
    assert not torch.equal(draw(0), draw(1)) and not torch.equal(draw(0), draw(0, 2))
    torch.manual_seed(3)
    default = sde_step_with_logprob(scheduler, v, t, x)[0]
    torch.manual_seed(3)
    assert torch.equal(default, sde_step_with_logprob(scheduler, v, t, x)[0])
    each = [torch.Generator().manual_seed(i) for i in (5, 6, 5)]
    same_noise = sde_step_with_logprob(
        scheduler, v[:1].repeat(3, 1, 1), t, x[:1].repeat(3, 1, 1), generator=each
    )[0]
    assert torch.equal(same_noise[0], same_noise[2])
    assert not torch.equal(same_noise[0], same_noise[1])


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_gradients_of_log_prob_and_mean(
    scheduler: FlowMatchEulerDiscreteScheduler, sde_type: str
) -> None:
    """Against autograd through the equations as flow_grpo writes them."""
    x, v = small()
    t = scheduler.timesteps[3]
    nxt = sde_step_with_logprob(scheduler, v, t, x, sde_type=sde_type)[0]
    leaf = v.clone().requires_grad_()
    _, logp, mean, std = sde_step_with_logprob(
        scheduler, leaf, t, x, prev_sample=nxt, sde_type=sde_type
    )
    (logp.sum() + (mean**2).mean()).backward()
    plain = v.double().requires_grad_()
    s0, s1 = (float(s) for s in scheduler.sigmas[3:5])
    if sde_type == "sde":
        g2, dt = float(std.double()) ** 2, s1 - s0
        plain_mean = x + (plain + g2 / (2 * s0) * (x + (1 - s0) * plain)) * dt
        density = -((nxt - plain_mean) ** 2) / (2 * g2 * -dt)
    else:
        rest = math.sqrt(s1**2 - float(std.double()) ** 2)
        plain_mean = (1 - s1) * (x - s0 * plain) + rest * (x + (1 - s0) * plain)
        density = -((nxt - plain_mean) ** 2)
    (density.mean((1, 2)).sum() + (plain_mean**2).mean()).backward()
    # Float32 residuals of size 0.3 beside x' of size 3: about 10 ulp, over N = 24.
    torch.testing.assert_close(leaf.grad, plain.grad.float(), rtol=1e-5, atol=1e-7)


def test_ratio_is_one_when_the_drawn_sample_is_scored_again(
    scheduler: FlowMatchEulerDiscreteScheduler,
) -> None:
    x, v = small()
    t = scheduler.timesteps[4].repeat(3)
    drawn, old, *_ = sde_step_with_logprob(scheduler, v, t, x)
    new = sde_step_with_logprob(scheduler, v, t, x, prev_sample=drawn)[1]
    assert torch.equal(new, old)
    assert not drawn.requires_grad


def test_low_precision_inputs_are_computed_in_float32(
    scheduler: FlowMatchEulerDiscreteScheduler,
) -> None:
    x, v = (t.bfloat16() for t in small())
    t = scheduler.timesteps[4]
    low = sde_step_with_logprob(scheduler, v, t, x, generator=torch.Generator().manual_seed(0))
    full = sde_step_with_logprob(
        scheduler, v.float(), t, x.float(), generator=torch.Generator().manual_seed(0)
    )
    assert all(torch.equal(a, b) for a, b in zip(low, full, strict=True))


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_no_noise_is_the_ode(scheduler: FlowMatchEulerDiscreteScheduler, sde_type: str) -> None:
    """What flow_grpo evaluates with. Its log_prob is NaN there for 'sde'; here it is 0."""
    x, v = small()
    t = scheduler.timesteps[4]
    prev_sample, logp, mean, std = sde_step_with_logprob(
        scheduler, v, t, x, noise_level=0.0, sde_type=sde_type
    )
    dt = float(scheduler.sigmas[5] - scheduler.sigmas[4])
    torch.testing.assert_close(prev_sample, x + dt * v, rtol=1e-6, atol=1e-6)
    assert torch.equal(prev_sample, mean)
    assert (logp == 0).all() and float(std) == 0.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"timestep": 123.0}, "not one of scheduler.timesteps"),
        ({"timestep": torch.tensor([926.0], dtype=torch.bfloat16)}, "bfloat16.*uncast"),
        ({"timestep": torch.tensor([1000.0, 1000.0])}, "timestep has 2 values"),
        ({"model_output": torch.zeros(3, 6, 5)}, "model_output has shape"),
        ({"prev_sample": torch.zeros(2, 6, 4)}, "prev_sample has shape"),
        ({"sample": torch.zeros(3)}, "sample has shape"),
        ({"sde_type": "cp"}, "Did you mean 'cps'"),
        ({"noise_level": -0.1}, "eta is -0.1"),
        ({"noise_level": math.nan}, "eta is nan"),
        ({"sde_type": "cps", "noise_level": 1.2}, "want 0 <= eta <= 1"),
        ({"generator": [torch.Generator()] * 2}, "list of 2"),
        (
            {"prev_sample": torch.zeros(3, 6, 4), "generator": torch.Generator()},
            "both given",
        ),
    ],
)
def test_bad_input_is_named(
    scheduler: FlowMatchEulerDiscreteScheduler, change: dict[str, object], words: str
) -> None:
    x, v = small()
    arguments: dict[str, object] = {"model_output": v, "timestep": 1000.0, "sample": x}
    sde_step_with_logprob(scheduler, **arguments)
    with pytest.raises(ValueError, match=words):
        sde_step_with_logprob(scheduler, **(arguments | change))
