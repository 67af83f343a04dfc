"""Noise levels of a trajectory, bit for bit those of the stock scheduler and pipelines.

The Qwen-Image pipelines hand sigmas = linspace(1, 1/T, T) and

    mu = base_shift + (max_shift - base_shift) (tokens - base_len) / (max_len - base_len)

(extrapolated, not clamped) to diffusers' FlowMatchEulerDiscreteScheduler, which computes, in
float32,

    shifted  = e^mu / (e^mu + 1/t - 1)               time_shift_type "exponential"
             | mu  / (mu  + 1/t - 1)                 time_shift_type "linear"
             | shift t / (1 + (shift - 1) t)         use_dynamic_shifting false
    terminal = 1 - (1 - shifted) (1 - shift_terminal) / (1 - shifted[-1])

and appends 0. FLUX.1 does the same. Adapters of pipelines that hand it something else put their
rule into the scheduler's config, under two keys that diffusers does not have:

    ramp "float32"    linspace in float32                                          Z-Image
    ramp "training"   no sigmas: linspace(1, s, T) in float64, s the smallest shifted level of
                      training, which is then shifted once more                    SD 3.5
    mu "flux2"        m10 = 8.73809524e-5 tokens + 1.89833333, m200 = 0.00016927 tokens + 0.45666666
                      mu = m200 above 4300 tokens, else on the line through (10, m10), (200, m200)
                      at T steps                                                   FLUX.2

The same operations are done here in the same order and precision, so that rollout,
replay and the stock pipeline agree on every bit; the result is returned as float64 because the
step coefficients are computed in float64. mu depends on the number of target tokens: replay must
be given the same number.

Source: huggingface/diffusers FlowMatchEulerDiscreteScheduler and the pipelines, 0.42.1.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_UNSUPPORTED = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)


def _positive_integer(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} is {value!r}; want an integer >= 1.")
    return int(value)


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"scheduler config: {key} is {value!r}; want a finite number.")
    return value


def shift_mu(image_tokens: int, scheduler_config: Mapping[str, Any]) -> float:
    """The dynamic shift of an image of `image_tokens` target tokens (float64).

    Keys read, with the stock defaults: base_image_seq_len 256, max_image_seq_len 4096,
    base_shift 0.5, max_shift 1.15.
    """
    tokens = _positive_integer("image_tokens", image_tokens)
    base_len = _number(scheduler_config, "base_image_seq_len", 256)
    max_len = _number(scheduler_config, "max_image_seq_len", 4096)
    base_shift = _number(scheduler_config, "base_shift", 0.5)
    max_shift = _number(scheduler_config, "max_shift", 1.15)
    if max_len <= base_len:
        raise ValueError(
            f"scheduler config: max_image_seq_len is {max_len} and base_image_seq_len is "
            f"{base_len}; want max_image_seq_len > base_image_seq_len."
        )
    slope = (max_shift - base_shift) / (max_len - base_len)
    return tokens * slope + (base_shift - slope * base_len)


def flux2_mu(image_tokens: int, num_steps: int) -> float:
    """The dynamic shift of FLUX.2, which depends on the steps too (float64)."""
    tokens, steps = _positive_integer("image_tokens", image_tokens), num_steps
    m_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return m_200
    m_10 = 8.73809524e-05 * tokens + 1.89833333
    a = (m_200 - m_10) / 190.0
    return a * steps + (m_200 - 200.0 * a)


def _static(sigmas: np.ndarray, scheduler_config: Mapping[str, Any]) -> np.ndarray:
    shift = _number(scheduler_config, "shift", 1.0)
    if shift <= 0:
        raise ValueError(f"scheduler config: shift is {shift}; want shift > 0.")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _ramp(steps: int, scheduler_config: Mapping[str, Any]) -> np.ndarray:
    """The levels [steps] before any shift; see the module docstring."""
    kind = scheduler_config.get("ramp")
    if kind is None:
        return np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    if kind == "float32":
        return torch.linspace(1.0, 1 / steps, steps).numpy()
    if kind == "training":
        scale = scheduler_config.get("num_train_timesteps", 1000)
        ends = np.array([scale, 1], np.float32) / np.float32(scale)
        if not scheduler_config.get("use_dynamic_shifting", False):
            ends = _static(ends, scheduler_config)
        first, last = (float(end) * scale for end in ends)
        return np.linspace(first, last, steps) / scale
    raise ValueError(f"scheduler config: ramp is {kind!r}; want 'float32' or 'training'.")


def _shifted(
    ramp_T: np.ndarray, image_tokens: int, scheduler_config: Mapping[str, Any]
) -> np.ndarray:
    if not scheduler_config.get("use_dynamic_shifting", False):
        return _static(ramp_T, scheduler_config)
    rule = scheduler_config.get("mu")
    if rule not in (None, "flux2"):
        raise ValueError(f"scheduler config: mu is {rule!r}; want 'flux2', or no such key.")
    mu = (
        flux2_mu(image_tokens, len(ramp_T))
        if rule == "flux2"
        else shift_mu(image_tokens, scheduler_config)
    )
    kind = scheduler_config.get("time_shift_type", "exponential")
    if kind == "exponential":
        return math.exp(mu) / (math.exp(mu) + (1 / ramp_T - 1))
    if kind == "linear":
        if mu <= 0:
            raise ValueError(
                f"scheduler config: mu is {mu} at {image_tokens} tokens; a linear time shift wants "
                f"mu > 0: check base_shift and max_shift."
            )
        return mu / (mu + (1 / ramp_T - 1))
    raise ValueError(
        f"scheduler config: time_shift_type is {kind!r}; want 'exponential' or 'linear'."
    )


def make_sigmas(
    num_steps: int, image_tokens: int, scheduler_config: Mapping[str, Any]
) -> np.ndarray:
    """float64 [num_steps + 1], strictly decreasing from 1 to 0; every entry is a float32 value.

    num_steps: denoising steps T >= 1 (>= 2 where shift_terminal is set: the stretch is 0/0 at 1).
    image_tokens: target tokens, H/16 * W/16 for both Qwen-Image families.
    scheduler_config: the `scheduler_config.json` mapping; missing keys have the stock defaults.
    Raises ValueError for a bad number of steps or tokens, a config value out of range, or an
    option whose schedule is not implemented here (Karras, exponential or beta sigmas, inverted
    sigmas, stochastic sampling).
    """
    steps = _positive_integer("num_steps", num_steps)
    _positive_integer("image_tokens", image_tokens)
    for key in _UNSUPPORTED:
        if scheduler_config.get(key):
            raise ValueError(
                f"scheduler config: {key} is {scheduler_config[key]!r}; only the plain flow "
                f"schedule is implemented: set it to false."
            )
    sigmas_T = _shifted(_ramp(steps, scheduler_config), image_tokens, scheduler_config)
    if scheduler_config.get("shift_terminal"):
        terminal = _number(scheduler_config, "shift_terminal", 0.0)
        if not 0 < terminal < 1:
            raise ValueError(
                f"scheduler config: shift_terminal is {terminal}; want 0 < shift_terminal < 1."
            )
        if steps < 2:
            raise ValueError(
                f"num_steps is 1 and shift_terminal is {terminal}: one step cannot both start at "
                f"sigma = 1 and end at shift_terminal. Use num_steps >= 2, or no shift_terminal."
            )
        distance_T = 1 - sigmas_T
        if distance_T[-1] == 0:
            raise ValueError(
                f"the shift leaves every sigma of {steps} steps at {image_tokens} tokens at 1 in "
                f"float32; check shift, base_shift and max_shift."
            )
        sigmas_T = 1 - distance_T / (distance_T[-1] / (1 - terminal))
    result = np.append(sigmas_T.astype(np.float32).astype(np.float64), 0.0)
    if not (np.diff(result) < 0).all():
        raise ValueError(
            f"the schedule of {steps} steps at {image_tokens} tokens does not decrease strictly in "
            f"float32: {result}. Use fewer steps, or check shift, base_shift and max_shift."
        )
    return result


def make_timesteps(sigmas: np.ndarray, scheduler_config: Mapping[str, Any]) -> np.ndarray:
    """float32 [T]: what the scheduler calls `timesteps`, sigma * num_train_timesteps.

    sigmas: float64 [T + 1] from `make_sigmas`. The pipelines divide by 1000 in the latents' dtype
    before they call the transformer; float32 multiply and divide do not cancel exactly.
    """
    scale = _positive_integer(
        "num_train_timesteps", scheduler_config.get("num_train_timesteps", 1000)
    )
    return sigmas[:-1].astype(np.float32) * np.float32(scale)
