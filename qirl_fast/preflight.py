"""What only shows beside the model and the prompt files, checked before anything is computed.

`load_config` checks a recipe by itself. Here its sizes meet the model's, and every prompt row the
judges that will score it: a row that a judge cannot score would otherwise drop its whole group,
update after update. All problems are reported together.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qirl_fast.config import Config, ConfigError
from qirl_fast.data.prompts import Prompt
from qirl_fast.rewards.judges import Judges
from qirl_fast.rollout.dynamics import step_coefficients
from qirl_fast.rollout.sample import Model
from qirl_fast.rollout.schedule import make_sigmas


def preflight(
    cfg: Config,
    model: Model,
    judges: Judges,
    scheduler_config: Mapping[str, Any],
    prompts: Mapping[str, list[Prompt]],
    files: Mapping[str, Path],
) -> None:
    """Raise ConfigError with one line per problem.

    prompts, files: "train" and "heldout", the rows and where they were read from.
    """
    problems = [*_size_problems(cfg, model, scheduler_config), *_count_problems(cfg, prompts)]
    for name, rows in prompts.items():
        problems += _row_problems(judges, rows, files[name])
    if problems:
        raise ConfigError(problems)


def _size_problems(cfg: Config, model: Model, scheduler_config: Mapping[str, Any]) -> Iterator[str]:
    height, width = cfg.rollout.height, cfg.rollout.width
    try:
        tokens, _ = model.latent_shape(height, width)
    except ValueError as error:
        yield f"rollout.height, rollout.width: {error}"
        return
    for key, steps in (("rollout", cfg.rollout.steps), ("evaluation", cfg.evaluation.steps)):
        try:
            make_sigmas(steps, tokens, scheduler_config)
        except ValueError as error:
            yield f"{key}.steps: {error}"
            return
    yield from _dynamics_problems(cfg, make_sigmas(cfg.rollout.steps, tokens, scheduler_config))


def _dynamics_problems(cfg: Config, sigmas: np.ndarray) -> Iterator[str]:
    """The first step that may be trained and whose coefficients are out of range."""
    r = cfg.rollout
    drawn = r.sde_steps.high if r.sde_steps else None
    first, last = 0, drawn or r.steps - 1
    if r.window:
        first, last = r.window.start, r.window.start + r.window.size
    for i in range(first, last):
        try:
            step_coefficients(
                r.dynamics,
                float(sigmas[i]),
                float(sigmas[i + 1]),
                eta=r.eta,
                sigma_max=float(sigmas[1]),
            )
        except ValueError as error:
            yield f"rollout.eta: step {i}: {error}"
            return


def _count_problems(cfg: Config, prompts: Mapping[str, list[Prompt]]) -> Iterator[str]:
    have, want = len(prompts["heldout"]), cfg.evaluation.prompts
    if not 2 <= want <= have:
        yield (
            f"evaluation.prompts: got {want}; {cfg.data.heldout} has {have}, and an interval needs "
            f"two: allowed: 2 to {have}"
        )
    have, want = len(prompts["train"]), cfg.data.prompts_per_step
    if want > have:
        yield (
            f"data.prompts_per_step: got {want}; {cfg.data.train} has {have}, and no prompt comes "
            f"twice in a batch: allowed: 1 to {have}"
        )


def _row_problems(judges: Judges, rows: list[Prompt], file: Path) -> Iterator[str]:
    """The first row of the file that a judge refuses, for each judge."""
    refused: set[str] = set()
    for number, row in enumerate(rows, start=1):
        for judge, fault in judges.check_row(row.metadata):
            if judge not in refused:
                refused.add(judge)
                yield f"{file}:{number}: judge {judge!r} cannot score this row: {fault}"
