"""One paper a file, the same methods in each: record, sampling, prepare, loss, after_step."""

from typing import Annotated, Any

from pydantic import Field

from qirl_fast.algorithms import awm, dppo, grpo, grpo_guard, nft, opd
from qirl_fast.algorithms.algorithm import Algorithm, Policy, StepLoss

ALGORITHMS: dict[str, type[Algorithm]] = {
    "grpo": grpo.Grpo,
    "grpo_guard": grpo_guard.GrpoGuard,
    "dppo": dppo.Dppo,
    "nft": nft.Nft,
    "awm": awm.Awm,
    "opd": opd.Opd,
}
AlgorithmSettings = Annotated[
    grpo.Settings
    | grpo_guard.Settings
    | dppo.Settings
    | nft.Settings
    | awm.Settings
    | opd.Settings,
    Field(discriminator="name"),
]


def make_algorithm(settings: Any, policy: Policy) -> Algorithm:
    """The algorithm that the settings name."""
    return ALGORITHMS[settings.name](settings, policy)


__all__ = ["ALGORITHMS", "Algorithm", "AlgorithmSettings", "Policy", "StepLoss", "make_algorithm"]
