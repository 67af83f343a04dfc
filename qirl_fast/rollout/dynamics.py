"""One-step dynamics as five scalars per sample: how a step moves, spreads and is scored.

Every dynamics in use has the form (METHOD: sigma in [0, 1], 1 is pure noise, x = (1-sigma) x0
+ sigma eps, v = eps - x0, a step goes sigma -> sigma' < sigma, dt = sigma' - sigma < 0)

    mean = a x + c v,   x' = mean + s eps,   logp = mean over dims of (-w (x' - mean)^2) - b

so the kernels (ops.flow_step, ops.flow_logp) only ever see (a, c, s, w, b):

    ode            a = 1                         c = dt
    langevin(g)    a = 1 + g^2 dt / (2 sigma)    c = (1 + g^2 (1-sigma) / (2 sigma)) dt
                   s = g sqrt(-dt)               w = 1 / (2 s^2),  b = log s + log(2 pi) / 2
    flow_sde       langevin, g = eta sqrt(sigma / (1-sigma)); at sigma = 1 the denominator is
                   1 - sigma_max, sigma_max = sigmas[1]             (Flow-GRPO, arXiv 2505.05470)
    dance_sde      langevin, g = eta                                (DanceGRPO, arXiv 2505.07818)
    cps            s = sigma' sin(eta pi/2), q = sqrt(sigma'^2 - s^2) = sigma' cos(eta pi/2)
                   a = (1-sigma') + q,  c = (1-sigma) q - sigma (1-sigma')
                   w = 1, b = 0                                     (Flow-CPS, arXiv 2509.05952)

The cps score -mean r^2 is what every trainer uses and is not a log-density; `normalised=True`
gives the Gaussian one (w and b as for langevin). Coefficients are Python floats computed in
float64; the caller casts them to float32 once.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
_FLOAT32_MAX = 3.4028234663852886e38


@dataclass(frozen=True)
class StepCoefficients:
    """mean = a x + c v, x' = mean + s eps, logp = mean(-w (x' - mean)^2) - b."""

    a: float
    c: float
    s: float
    w: float
    b: float


@dataclass(frozen=True)
class _Step:
    sigma: float
    sigma_next: float
    eta: float
    sigma_max: float
    normalised: bool

    @property
    def dt(self) -> float:
        return self.sigma_next - self.sigma


def _gaussian_score(s: float) -> tuple[float, float]:
    """(w, b) of the normal density with standard deviation s; (0, 0) without noise."""
    if s == 0.0:
        return 0.0, 0.0
    variance = s * s
    w = 0.5 / variance if variance > 0.0 else math.inf
    return w, math.log(s) + _HALF_LOG_2PI


def _ode(step: _Step) -> StepCoefficients:
    return StepCoefficients(a=1.0, c=step.dt, s=0.0, w=0.0, b=0.0)


def _langevin_with(step: _Step, g: float) -> StepCoefficients:
    drift = g * g / (2.0 * step.sigma)
    s = g * math.sqrt(-step.dt)
    w, b = _gaussian_score(s)
    return StepCoefficients(
        a=1.0 + drift * step.dt, c=(1.0 + drift * (1.0 - step.sigma)) * step.dt, s=s, w=w, b=b
    )


def _langevin(step: _Step) -> StepCoefficients:
    return _langevin_with(step, step.eta)


def _flow_sde(step: _Step) -> StepCoefficients:
    reference = step.sigma
    if step.sigma == 1.0:
        reference = step.sigma_max
        if not 0.0 <= reference < 1.0:
            raise ValueError(
                f"flow_sde: sigma is 1, where the noise scale divides by 1 - sigma_max, and "
                f"sigma_max is {reference}; want 0 <= sigma_max < 1: pass sigmas[1]."
            )
    return _langevin_with(step, step.eta * math.sqrt(step.sigma / (1.0 - reference)))


def _cps(step: _Step) -> StepCoefficients:
    if step.eta > 1.0:
        raise ValueError(
            f"cps: eta is {step.eta}; want 0 <= eta <= 1 (1 is all of the next step's noise)."
        )
    angle = step.eta * math.pi / 2.0
    s = step.sigma_next * math.sin(angle)
    q = step.sigma_next * math.cos(angle)
    w, b = _gaussian_score(s) if step.normalised else (1.0, 0.0)
    return StepCoefficients(
        a=(1.0 - step.sigma_next) + q,
        c=(1.0 - step.sigma) * q - step.sigma * (1.0 - step.sigma_next),
        s=s,
        w=w,
        b=b,
    )


DYNAMICS: dict[str, Callable[[_Step], StepCoefficients]] = {
    "ode": _ode,
    "langevin": _langevin,
    "flow_sde": _flow_sde,
    "dance_sde": _langevin,
    "cps": _cps,
}


def step_coefficients(
    name: str,
    sigma: float,
    sigma_next: float,
    *,
    eta: float,
    sigma_max: float,
    normalised: bool = False,
) -> StepCoefficients:
    """Coefficients of the step sigma -> sigma_next of the dynamics `name`.

    name: one of DYNAMICS. sigma in (0, 1], sigma_next in [0, sigma).
    eta: noise level >= 0 (cps: <= 1; langevin: g itself; ode draws no noise, so eta has no part).
    sigma_max: sigmas[1] of the schedule, in [0, 1); only flow_sde at sigma = 1 reads it.
    normalised: cps only: score with the Gaussian log-density instead of -mean r^2. The
        langevin family is always normalised.
    A step with s = 0 has no density: w = b = 0 (but un-normalised cps keeps w = 1, a distance).
    Raises ValueError for an unknown name and for values out of range or not finite, and when eta
    is so small that w does not fit float32.
    """
    if name not in DYNAMICS:
        near = difflib.get_close_matches(str(name), DYNAMICS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown dynamics {name!r}; want one of {', '.join(DYNAMICS)}. Did you mean {near!r}?"
        )
    step = _Step(float(sigma), float(sigma_next), float(eta), float(sigma_max), normalised)
    if not 0.0 < step.sigma <= 1.0:
        raise ValueError(f"{name}: sigma is {step.sigma}; want 0 < sigma <= 1 (1 is pure noise).")
    if not 0.0 <= step.sigma_next < step.sigma:
        raise ValueError(
            f"{name}: sigma_next is {step.sigma_next}; want 0 <= sigma_next < sigma = "
            f"{step.sigma} (a step removes noise)."
        )
    if not 0.0 <= step.eta < math.inf:
        raise ValueError(f"{name}: eta is {step.eta}; want a finite noise level >= 0.")
    coefficients = DYNAMICS[name](step)
    for field, value in asdict(coefficients).items():
        if not abs(value) <= _FLOAT32_MAX:
            raise ValueError(
                f"{name}: eta = {step.eta} from sigma = {step.sigma} to {step.sigma_next} makes "
                f"{field} = {value}, which float32 cannot hold; choose another eta, or 'ode' for "
                f"no noise."
            )
    return coefficients
