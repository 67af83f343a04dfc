"""What a transformer computes from the noise level alone, kept for the next time it is asked.

All rows of a rollout step share one noise level, and all updates share a schedule: modulation is
computed once per level for as long as its weights stay what they are.
"""

from collections.abc import Callable, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


class ModulationCache:
    """Modulation rows by noise level, of the weights' current version.

    A level is always computed by itself, whether kept or not, so its bits do not depend on what is
    asked for beside it. Nothing is kept where a gradient flows into the modulation's weights, or
    where an adapter that can be switched sits on them.
    """

    LEVELS = 128  # kept at most; a schedule with more starts over

    def __init__(
        self, modules: Sequence[nn.Module], compute: Callable[[float], tuple[Tensor, ...]]
    ):
        """Args: modules: what `compute` reads weights of; compute: a level to its rows [1, D_i]."""
        self._modules, self._compute = modules, compute
        self._kept: dict[float, tuple[Tensor, ...]] = {}
        self._version: tuple[tuple[object, ...], ...] = ()
        self._held: list[Tensor] = []
        self.computed = 0  # levels computed so far
        self.keeps = True  # False: where weights are gathered, which moves no version

    def rows(self, sigma: Sequence[float]) -> tuple[Tensor, ...]:
        """Rows [R, D_i] of the R noise levels."""
        found = [self._one(float(level)) for level in sigma]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def _one(self, level: float) -> tuple[Tensor, ...]:
        parts = [part for module in self._modules for part in module.modules()]
        weights = [p for part in parts for p in part._parameters.values() if p is not None]
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in weights)
        if not self.keeps or trained or any(isinstance(part, BaseTunerLayer) for part in parts):
            self.computed += 1
            return self._compute(level)
        # In-place changes move the version; exchanged weights (p.data = ...) lie elsewhere, as the
        # old ones are held on to.
        version = (
            tuple((p.untyped_storage()._cdata, p._version) for p in weights),
            tuple(getattr(part, "in_fp8", False) for part in parts),
        )
        if version != self._version or len(self._kept) >= self.LEVELS:
            self._kept, self._version = {}, version
            self._held = [p.detach() for p in weights]
        kept = self._kept  # another thread may start over meanwhile
        rows = kept.get(level)
        if rows is None:
            self.computed += 1
            # Rows made in inference mode could not be saved for a backward pass later.
            with torch.inference_mode(False), torch.no_grad():
                rows = kept[level] = self._compute(level)
        return rows
