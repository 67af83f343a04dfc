"""Hybrid classifier-free guidance: guided rollout, a ratio that never needs the other branch.

How the guided rollout enters the policy ratio (the report does not say, so it is declared):

    frozen_offset   delta = c (v_cfg - v_c) of each recorded step is stored and added to the
                    replayed mean; the ratio is exactly 1 before the first update and training
                    runs no unconditional forward
    conditional     the old log-prob is that of the sampled state under the conditional branch
                    alone; slowly distils guidance into the weights
    full            both branches are in the objective (flow_grpo on Qwen-Image)

Source: arXiv 2606.27608; flow_grpo `scripts/train_qwenimage.py`.
"""

from dataclasses import dataclass

from torch import Tensor

from qirl_fast import ops

RATIO_MODES = ("frozen_offset", "conditional", "full")


@dataclass(frozen=True)
class Guidance:
    """scale 1 is off; `rescale` keeps each token's conditional norm (Qwen-Image 1.x).

    Outside of `interval`, noise levels with both ends, no step is guided (arXiv 2404.07724).
    """

    scale: float = 1.0
    rescale: bool = False
    ratio_mode: str | None = None
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.on and self.ratio_mode is not None and self.ratio_mode not in RATIO_MODES:
            raise ValueError(f"ratio_mode {self.ratio_mode!r}: use one of {', '.join(RATIO_MODES)}")

    @property
    def on(self) -> bool:
        return self.scale != 1.0

    def at(self, sigma: float) -> bool:
        """True where a step that starts at noise level sigma is guided."""
        return self.on and self.interval[0] <= sigma <= self.interval[1]

    @property
    def in_objective(self) -> bool:
        """True when replay runs the unconditional branch too."""
        return self.on and self.ratio_mode == "full"

    def combine(self, v_cond: Tensor, v_uncond: Tensor) -> Tensor:
        """v_u + scale (v_c - v_u), optionally rescaled per token."""
        return ops.guide(v_cond, v_uncond, self.scale, rescale=self.rescale)
