"""make_sigmas against the stock scheduler as QwenImage21Pipeline drives it, bit for bit."""

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import (
    calculate_shift,
    retrieve_timesteps,
)
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

from qirl_fast.rollout.schedule import make_sigmas, make_timesteps, shift_mu

QWEN = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift": 1.0,
    "shift_terminal": 0.02,
}


def stock(steps: int, tokens: int, config: dict) -> tuple[np.ndarray, np.ndarray, float]:
    """(sigmas, timesteps, mu) by the calls of QwenImage21Pipeline.__call__."""
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    mu = calculate_shift(
        tokens,
        scheduler.config.get("base_image_seq_len", 256),
        scheduler.config.get("max_image_seq_len", 4096),
        scheduler.config.get("base_shift", 0.5),
        scheduler.config.get("max_shift", 1.15),
    )
    ramp = np.linspace(1.0, 1 / steps, steps)
    timesteps, _ = retrieve_timesteps(scheduler, steps, "cpu", sigmas=ramp, mu=mu)
    return scheduler.sigmas.numpy(), timesteps.numpy(), mu


@pytest.mark.parametrize("tokens", [1, 16, 256, 1024, 4096, 8192, 16384])
@pytest.mark.parametrize("steps", [2, 3, 8, 10, 20, 40, 50])
def test_bits_of_the_stock_schedule(steps: int, tokens: int) -> None:
    sigmas, timesteps, mu = stock(steps, tokens, QWEN)
    ours = make_sigmas(steps, tokens, QWEN)
    assert ours.dtype == np.float64 and ours.shape == (steps + 1,)
    np.testing.assert_array_equal(ours, sigmas.astype(np.float64))
    np.testing.assert_array_equal(make_timesteps(ours, QWEN), timesteps)
    assert make_timesteps(ours, QWEN).dtype == np.float32
    assert shift_mu(tokens, QWEN) == mu


@pytest.mark.parametrize(
    "change",
    [
        {"time_shift_type": "linear"},
        {"shift_terminal": None},
        {"use_dynamic_shifting": False},
        {"use_dynamic_shifting": False, "shift": 3.0, "shift_terminal": None},
        {"num_train_timesteps": 500},
    ],
)
def test_bits_under_other_configs(change: dict) -> None:
    config = QWEN | change
    sigmas, timesteps, _ = stock(10, 1024, config)
    ours = make_sigmas(10, 1024, config)
    np.testing.assert_array_equal(ours, sigmas.astype(np.float64))
    np.testing.assert_array_equal(make_timesteps(ours, config), timesteps)


TOKENS = (16, 1024, 4096, 4301, 8192)
STEPS = (1, 4, 10, 28, 50)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("steps", STEPS)
def test_bits_of_the_other_pipelines_schedules(steps: int, tokens: int) -> None:
    """FLUX.1, FLUX.2, SD 3.5 and Z-Image, by the calls of their pipelines."""
    ramp = np.linspace(1.0, 1 / steps, steps)
    dynamic = {"shift": 3.0, "use_dynamic_shifting": True}
    static = {"shift": 3.0}
    flux1 = calculate_shift(tokens, 256, 4096, 0.5, 1.15)
    cases = [
        (dynamic, {}, {"sigmas": ramp, "mu": flux1}),
        (dynamic, {"mu": "flux2"}, {"sigmas": ramp, "mu": compute_empirical_mu(tokens, steps)}),
        (static, {"ramp": "training"}, {"num_inference_steps": steps}),
        (dynamic, {"ramp": "training"}, {"num_inference_steps": steps, "mu": flux1}),
        (static, {"ramp": "float32"}, {"sigmas": get_default_z_image_sigmas(steps)}),
    ]
    for config, rules, given in cases:
        scheduler = FlowMatchEulerDiscreteScheduler(**config)
        scheduler.set_timesteps(**given)
        ours = make_sigmas(steps, tokens, dict(scheduler.config) | rules)
        np.testing.assert_array_equal(ours, scheduler.sigmas.double().numpy())


def test_missing_keys_take_the_stock_defaults() -> None:
    np.testing.assert_array_equal(make_sigmas(7, 300, {}), stock(7, 300, {})[0])
    dynamic = {"use_dynamic_shifting": True}
    np.testing.assert_array_equal(make_sigmas(7, 300, dynamic), stock(7, 300, dynamic)[0])


def test_published_numbers_at_512_px() -> None:
    """32 x 32 tokens, 10 steps; the literature gives three digits, so within one of the last."""
    sigmas = make_sigmas(10, 1024, QWEN)
    assert round(shift_mu(1024, QWEN), 3) == 0.539
    published = [1.0, 0.929, 0.852, 0.767, 0.673, 0.570]
    np.testing.assert_allclose(sigmas[:6], published, rtol=0, atol=1e-3)
    # The stretch ends at shift_terminal up to the float32 rounding of 1 - t (2^-24).
    assert abs(sigmas[-2] - 0.02) <= 2**-24
    assert sigmas[-1] == 0.0


def test_one_step_without_terminal() -> None:
    np.testing.assert_array_equal(make_sigmas(1, 64, QWEN | {"shift_terminal": None}), [1.0, 0.0])


@pytest.mark.parametrize(
    ("steps", "tokens", "change", "words"),
    [
        (0, 64, {}, "num_steps is 0"),
        (True, 64, {}, "num_steps is True"),
        (4.0, 64, {}, "num_steps is 4.0"),
        (4, 0, {}, "image_tokens is 0"),
        (4, 64.5, {}, "image_tokens is 64.5"),
        (1, 64, {}, "num_steps >= 2"),
        (4, 64, {"use_karras_sigmas": True}, "use_karras_sigmas"),
        (4, 64, {"use_beta_sigmas": True}, "use_beta_sigmas"),
        (4, 64, {"use_exponential_sigmas": True}, "use_exponential_sigmas"),
        (4, 64, {"invert_sigmas": True}, "invert_sigmas"),
        (4, 64, {"stochastic_sampling": True}, "stochastic_sampling"),
        (4, 64, {"time_shift_type": "cosine"}, "'exponential' or 'linear'"),
        (4, 64, {"shift_terminal": 1.0}, "0 < shift_terminal < 1"),
        (4, 64, {"shift_terminal": -0.1}, "0 < shift_terminal < 1"),
        (4, 64, {"base_shift": float("nan")}, "base_shift is nan"),
        (4, 64, {"max_shift": "0.9"}, "max_shift is '0.9'"),
        (4, 64, {"ramp": "even"}, "ramp is 'even'; want 'float32' or 'training'"),
        (4, 64, {"mu": "flux3"}, "mu is 'flux3'; want 'flux2', or no such key"),
        (4, 64, {"max_image_seq_len": 256}, "max_image_seq_len > base_image_seq_len"),
        (4, 64, {"use_dynamic_shifting": False, "shift": 0.0}, "shift > 0"),
        (4, 64, {"time_shift_type": "linear", "base_shift": -1.0}, "mu > 0"),
        (4, 64, {"base_shift": 40.0}, "leaves every sigma"),
        (4, 64, {"base_shift": 40.0, "shift_terminal": None}, "does not decrease strictly"),
    ],
)
def test_bad_input_is_named(steps: int, tokens: int, change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        make_sigmas(steps, tokens, QWEN | change)
