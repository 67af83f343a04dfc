"""flow_grpo's `sde_step_with_logprob`, with its arguments and return tuple, on `ops.flow_step`.

Drop-in for `flow_grpo.diffusers_patch.sd3_sde_with_logprob.sde_step_with_logprob` of
yifan123/flow_grpo: one reverse step of Flow-GRPO (arXiv 2505.05470, sde_type 'sde') or of Flow-CPS
(arXiv 2509.05952, 'cps'), its mean, and the log-probability of the next sample, averaged over all
but the batch dimension. The mathematics is in `qirl_fast.rollout.dynamics`.

Where it differs from flow_grpo:
- the noise is counter-based (Philox): the generator supplies one seed per row, so its state still
  decides the result, but the numbers are not those of `torch.randn`;
- coefficients are computed in float64 and rounded to float32 once;
- without noise ('sde' at noise_level 0) there is no density and log_prob is 0; flow_grpo gives NaN;
- `prev_sample` together with `generator`, a timestep that is not of the schedule, an unknown
  sde_type and mismatched shapes are errors.
"""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qirl_fast import ops
from qirl_fast.rollout.dynamics import StepCoefficients, step_coefficients

_DYNAMICS = {"sde": "flow_sde", "cps": "cps"}


def _step_indices(scheduler: Any, timestep: Any, rows: int) -> list[int]:
    """Position of each timestep in the schedule; one for the whole batch, or one per row."""
    if not isinstance(timestep, Tensor):
        timestep = torch.as_tensor(timestep, dtype=torch.float32)
    times = timestep.reshape(-1)
    if len(times) not in (1, rows):
        raise ValueError(
            f"timestep has {len(times)} values and sample has {rows} rows; want one timestep, or "
            f"one per row."
        )
    indices = []
    for time in times:
        try:
            indices.append(int(scheduler.index_for_timestep(time.to(scheduler.timesteps.device))))
        except IndexError:
            known = ", ".join(f"{t:.6g}" for t in scheduler.timesteps.tolist())
            raise ValueError(
                f"timestep {float(time)} ({times.dtype}) is not one of scheduler.timesteps: "
                f"{known}. Call scheduler.set_timesteps first and pass its float32 values, uncast."
            ) from None
    return indices


def _seeds(generator: Any, rows: int, device: torch.device) -> Tensor:
    """int64 [rows] drawn from the generator, from one generator a row, or from torch's own."""
    generators = list(generator) if isinstance(generator, Sequence) else [generator]
    if len(generators) not in (1, rows):
        raise ValueError(
            f"generator is a list of {len(generators)} and sample has {rows} rows; want one "
            f"generator, or one per row."
        )
    draws = []
    for one in generators:
        count = rows if len(generators) == 1 else 1
        where = "cpu" if one is None else one.device
        draws.append(torch.randint(2**63 - 1, (count,), generator=one, device=where))
    return torch.cat([draw.to(device) for draw in draws])


def _check_shapes(model_output: Tensor, sample: Tensor, prev_sample: Tensor | None) -> None:
    if sample.dim() < 2:
        raise ValueError(f"sample has shape {list(sample.shape)}; want [B, ...].")
    for name, value in (("model_output", model_output), ("prev_sample", prev_sample)):
        if value is not None and value.shape != sample.shape:
            raise ValueError(
                f"{name} has shape {list(value.shape)} and sample has {list(sample.shape)}; want "
                f"the same."
            )


def sde_step_with_logprob(
    scheduler: Any,
    model_output: Tensor,
    timestep: float | Tensor | Sequence[float],
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
) -> tuple[Tensor, ...]:
    """(prev_sample, log_prob, prev_sample_mean, std_dev_t[, sqrt_dt]), all float32.

    scheduler: FlowMatchEulerDiscreteScheduler after `set_timesteps`.
    model_output: velocity [B, ...]; sample: x at `timestep` [B, ...]; any float dtype, computed in
        float32 as flow_grpo does.
    timestep: one of scheduler.timesteps, or B of them.
    noise_level: eta >= 0 ('cps': <= 1).
    prev_sample: the next sample to score [B, ...]; None draws it.
    generator: decides the noise; one, or one per row; None is torch's default CPU generator.
    prev_sample_mean [B, ...] and log_prob [B] are differentiable in model_output and sample; the
    drawn prev_sample is not. std_dev_t is flow_grpo's: g for 'sde' (the noise is g sqrt(-dt)), the
    noise itself for 'cps'; it and sqrt_dt have shape [1 or B, 1, ...].
    Raises ValueError for any argument out of range, naming it.
    """
    if sde_type not in _DYNAMICS:
        near = difflib.get_close_matches(str(sde_type), _DYNAMICS, n=1, cutoff=0.0)[0]
        raise ValueError(f"sde_type is {sde_type!r}; want 'sde' or 'cps'. Did you mean {near!r}?")
    if prev_sample is not None and generator is not None:
        raise ValueError(
            "prev_sample and generator were both given; pass prev_sample to score it, or generator "
            "to draw a new one."
        )
    _check_shapes(model_output, sample, prev_sample)
    rows = sample.shape[0]
    indices = _step_indices(scheduler, timestep, rows)
    sigmas = scheduler.sigmas.double().tolist()
    steps = {
        i: step_coefficients(
            _DYNAMICS[sde_type], sigmas[i], sigmas[i + 1], eta=noise_level, sigma_max=sigmas[1]
        )
        for i in sorted(set(indices))
    }
    per_row = [steps[i] for i in indices] * (rows // len(indices))
    a, c, s, w, b = _columns(per_row, sample.device)

    x, v = sample.float(), model_output.float()
    log_prob = None
    if prev_sample is None:
        with torch.no_grad():
            seeds = _seeds(generator, rows, sample.device)
            x_next, log_prob = ops.flow_step(x, v, a, c, s, w, b, seed=seeds, offset=0)
    else:
        x_next = prev_sample.detach().float()
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or v.requires_grad)
    if log_prob is None or wants_gradient:  # the same bits, with a graph
        log_prob = ops.flow_logp(x, x_next, v, a, c, w, b)

    each = (-1, *[1] * (sample.dim() - 1))
    mean = a.view(each) * x + c.view(each) * v
    sqrt_dt = [math.sqrt(sigmas[i] - sigmas[i + 1]) for i in indices]
    std_dev = [steps[i].s for i in indices]
    if sde_type == "sde":
        std_dev = [s / root for s, root in zip(std_dev, sqrt_dt, strict=True)]
    std_dev_t = torch.tensor(std_dev, dtype=torch.float32, device=sample.device).view(each)
    if not return_sqrt_dt:
        return x_next, log_prob, mean, std_dev_t
    sqrt_dt_t = torch.tensor(sqrt_dt, dtype=torch.float32, device=sample.device).view(each)
    return x_next, log_prob, mean, std_dev_t, sqrt_dt_t


def _columns(per_row: list[StepCoefficients], device: torch.device) -> tuple[Tensor, ...]:
    """(a, c, s, w, b), float32 [B] each."""
    table = [(k.a, k.c, k.s, k.w, k.b) for k in per_row]
    return tuple(torch.tensor(table, dtype=torch.float32, device=device).t().contiguous())
