"""step_coefficients against the update equations as their papers and trainers write them.

The references work on concrete x, v and noise in float64 and in the authors' own terms (x0
estimates, scores, predicted noise), so they share no algebra with the (a, c, s, w, b) form.
"""

import itertools
import math

import numpy as np
import pytest

from qirl_fast.rollout.dynamics import DYNAMICS, StepCoefficients, step_coefficients
from qirl_fast.rollout.schedule import make_sigmas

QWEN = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}
SIGMAS = make_sigmas(10, 1024, QWEN)
STEPS = list(itertools.pairwise(SIGMAS))
RNG = np.random.default_rng(0)
X, V, NOISE = RNG.standard_normal((3, 64))
# Float64 chains of about ten operations on numbers of order one: a few hundred ulp of slack for
# the cancellation in 1 - sigma near sigma = 1, still six orders below a float32 ulp.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-13}


def apply(k: StepCoefficients) -> tuple[np.ndarray, np.ndarray, float]:
    """(mean, x', logp) of the five scalars."""
    mean = k.a * X + k.c * V
    x_next = mean + k.s * NOISE
    return mean, x_next, float(np.mean(-k.w * (x_next - mean) ** 2) - k.b)


def gaussian_logp(x_next: np.ndarray, mean: np.ndarray, std: float) -> float:
    z = (x_next - mean) / std
    return float(np.mean(-0.5 * z**2 - np.log(std * np.sqrt(2 * np.pi))))


def check(k: StepCoefficients, mean: np.ndarray, std: float, logp: float) -> None:
    ours_mean, ours_next, ours_logp = apply(k)
    np.testing.assert_allclose(ours_mean, mean, **TOLERANCE)
    np.testing.assert_allclose(ours_next, mean + std * NOISE, **TOLERANCE)
    np.testing.assert_allclose(ours_logp, logp, **TOLERANCE)


def flow_grpo_terms(sigma: float, sigma_next: float, eta: float) -> tuple[np.ndarray, float]:
    """Flow-GRPO eq. 9 with its code's rule for sigma = 1."""
    g = eta * math.sqrt(sigma / (1 - (SIGMAS[1] if sigma == 1 else sigma)))
    dt = sigma_next - sigma
    mean = X + (V + g**2 / (2 * sigma) * (X + (1 - sigma) * V)) * dt
    return mean, g * math.sqrt(-dt)


def dance_terms(sigma: float, sigma_next: float, eta: float) -> tuple[np.ndarray, float]:
    """DanceGRPO: the score of the x0 estimate, added to the flow step."""
    dt = sigma_next - sigma
    x0 = X - sigma * V
    score = -(X - (1 - sigma) * x0) / sigma**2
    return X + dt * V - 0.5 * eta**2 * score * dt, eta * math.sqrt(-dt)


def cps_terms(sigma: float, sigma_next: float, eta: float) -> tuple[np.ndarray, float]:
    """Flow-CPS: x0 and noise estimates remixed at the next noise level."""
    std = sigma_next * math.sin(eta * math.pi / 2)
    x0 = X - sigma * V
    eps = X + (1 - sigma) * V
    return (1 - sigma_next) * x0 + math.sqrt(sigma_next**2 - std**2) * eps, std


@pytest.mark.parametrize(("sigma", "sigma_next"), STEPS)
def test_ode_is_the_euler_step(sigma: float, sigma_next: float) -> None:
    k = step_coefficients("ode", sigma, sigma_next, eta=0.7, sigma_max=SIGMAS[1])
    check(k, X + (sigma_next - sigma) * V, 0.0, 0.0)
    assert (k.s, k.w, k.b) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.2])
@pytest.mark.parametrize(("sigma", "sigma_next"), STEPS)
def test_flow_sde(sigma: float, sigma_next: float, eta: float) -> None:
    k = step_coefficients("flow_sde", sigma, sigma_next, eta=eta, sigma_max=SIGMAS[1])
    mean, std = flow_grpo_terms(sigma, sigma_next, eta)
    check(k, mean, std, gaussian_logp(mean + std * NOISE, mean, std))


@pytest.mark.parametrize("name", ["dance_sde", "langevin"])
@pytest.mark.parametrize("eta", [0.1, 0.3, 1.0])
@pytest.mark.parametrize(("sigma", "sigma_next"), STEPS)
def test_dance_and_langevin(name: str, sigma: float, sigma_next: float, eta: float) -> None:
    k = step_coefficients(name, sigma, sigma_next, eta=eta, sigma_max=SIGMAS[1])
    mean, std = dance_terms(sigma, sigma_next, eta)
    check(k, mean, std, gaussian_logp(mean + std * NOISE, mean, std))


@pytest.mark.parametrize("eta", [0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize(("sigma", "sigma_next"), STEPS[:-1])
def test_cps(sigma: float, sigma_next: float, eta: float) -> None:
    mean, std = cps_terms(sigma, sigma_next, eta)
    x_next = mean + std * NOISE
    plain = step_coefficients("cps", sigma, sigma_next, eta=eta, sigma_max=SIGMAS[1])
    check(plain, mean, std, -float(np.mean((x_next - mean) ** 2)))
    assert (plain.w, plain.b) == (1.0, 0.0)
    density = step_coefficients(
        "cps", sigma, sigma_next, eta=eta, sigma_max=SIGMAS[1], normalised=True
    )
    check(density, mean, std, gaussian_logp(x_next, mean, std))


def test_cps_keeps_the_marginal() -> None:
    """The property that names the method: x' has weight 1-sigma' on x0 and sigma' of noise."""
    sigma, sigma_next = STEPS[4]
    for eta in (0.0, 0.3, 0.8, 1.0):
        k = step_coefficients("cps", sigma, sigma_next, eta=eta, sigma_max=SIGMAS[1])
        on_x0 = k.a * (1 - sigma) - k.c
        on_eps = k.a * sigma + k.c
        np.testing.assert_allclose(on_x0, 1 - sigma_next, **TOLERANCE)
        np.testing.assert_allclose(math.hypot(on_eps, k.s), sigma_next, **TOLERANCE)


def test_cps_at_full_noise_forgets_the_old_noise() -> None:
    k = step_coefficients("cps", 0.8, 0.5, eta=1.0, sigma_max=0.9)
    np.testing.assert_allclose([k.s, k.a, k.c], [0.5, 0.5, -0.4], **TOLERANCE)


@pytest.mark.parametrize("name", ["langevin", "flow_sde", "dance_sde", "cps"])
def test_no_noise_is_the_ode(name: str) -> None:
    for sigma, sigma_next in STEPS:
        quiet = step_coefficients(
            name, sigma, sigma_next, eta=0.0, sigma_max=SIGMAS[1], normalised=True
        )
        ode = step_coefficients("ode", sigma, sigma_next, eta=0.0, sigma_max=SIGMAS[1])
        np.testing.assert_allclose([quiet.a, quiet.c], [ode.a, ode.c], **TOLERANCE)
        assert (quiet.s, quiet.w, quiet.b) == (0.0, 0.0, 0.0)


def test_cps_last_step_has_no_noise() -> None:
    sigma = float(SIGMAS[-2])
    plain = step_coefficients("cps", sigma, 0.0, eta=0.8, sigma_max=SIGMAS[1])
    np.testing.assert_allclose([plain.a, plain.c], [1.0, -sigma], **TOLERANCE)
    assert (plain.s, plain.w, plain.b) == (0.0, 1.0, 0.0)
    density = step_coefficients("cps", sigma, 0.0, eta=0.8, sigma_max=SIGMAS[1], normalised=True)
    assert (density.s, density.w, density.b) == (0.0, 0.0, 0.0)


def test_sigma_max_matters_at_one_only() -> None:
    inside = [step_coefficients("flow_sde", 0.9, 0.8, eta=0.7, sigma_max=m) for m in (0.5, 0.93)]
    assert inside[0] == inside[1]
    at_one = [step_coefficients("flow_sde", 1.0, 0.8, eta=0.7, sigma_max=m) for m in (0.5, 0.93)]
    assert at_one[0] != at_one[1]


def test_values_are_python_floats() -> None:
    for name in DYNAMICS:
        k = step_coefficients(
            name, np.float64(0.9), np.float64(0.8), eta=np.float64(0.5), sigma_max=SIGMAS[1]
        )
        assert all(type(value) is float for value in (k.a, k.c, k.s, k.w, k.b))


@pytest.mark.parametrize("name", list(DYNAMICS))
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sigma": 0.0, "sigma_next": 0.0}, "sigma is 0.0; want 0 < sigma <= 1"),
        ({"sigma": 1.5}, "sigma is 1.5"),
        ({"sigma": float("nan")}, "sigma is nan"),
        ({"sigma_next": 0.9}, "sigma_next is 0.9; want 0 <= sigma_next < sigma"),
        ({"sigma_next": -0.1}, "sigma_next is -0.1"),
        ({"sigma_next": float("nan")}, "sigma_next is nan"),
        ({"eta": -0.5}, "eta is -0.5"),
        ({"eta": float("nan")}, "eta is nan"),
        ({"eta": float("inf")}, "eta is inf"),
    ],
)
def test_out_of_range_is_named(name: str, change: dict, words: str) -> None:
    arguments = {"sigma": 0.9, "sigma_next": 0.8, "eta": 0.5, "sigma_max": 0.93} | change
    with pytest.raises(ValueError, match=f"{name}: {words}"):
        step_coefficients(name, **arguments)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match=r"cps: eta is 1\.2; want 0 <= eta <= 1"):
        step_coefficients("cps", 0.9, 0.8, eta=1.2, sigma_max=0.93)
    for sigma_max in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"pass sigmas\[1\]"):
            step_coefficients("flow_sde", 1.0, 0.9, eta=0.7, sigma_max=sigma_max)
    with pytest.raises(ValueError, match="Did you mean 'flow_sde'"):
        step_coefficients("flow_sd", 0.9, 0.8, eta=0.7, sigma_max=0.93)
    for tiny in (1e-30, 1e-200):
        with pytest.raises(ValueError, match="which float32 cannot hold"):
            step_coefficients("dance_sde", 0.9, 0.8, eta=tiny, sigma_max=0.93)
    with pytest.raises(ValueError, match="which float32 cannot hold"):
        step_coefficients("dance_sde", 0.9, 0.8, eta=1e30, sigma_max=0.93)
