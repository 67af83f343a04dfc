"""What a configuration amounts to, and whether two of them give the same numbers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qirl_fast.config.rules import trained_group
from qirl_fast.config.schema import Config
from qirl_fast.config.wording import ConfigError
from qirl_fast.rewards.kinds import OPERATIONAL
from qirl_fast.section import Section

# These change no number of training.
UNHASHED = ("run", "output", "resume", "threads", "processes", "tracking", "failures", "curation")


@dataclass(frozen=True)
class Derived:
    """Sizes that follow from a recipe; counts, per update unless the name says otherwise."""

    samples: int  # images per update that are trained on: prompts x group
    explored: int  # images per update drawn to choose those from; 0: none
    minibatch_samples: int  # samples per optimizer step
    chunk_rows: int  # samples of one transformer call; they divide the minibatch
    recorded_steps: int  # steps per sample that the loss looks at
    replays: int  # (sample, step) pairs replayed
    sampled_rows: int  # transformer rows of a rollout, where every step is guided or none
    replay_rows: int  # (sample, step) pairs of one forward in training
    evaluation_images: int  # images of one evaluation
    total_samples: int  # images of the whole run's rollouts


def derived(cfg: Config) -> Derived:
    """Return the sizes that follow from cfg."""
    rollout = cfg.rollout
    group = trained_group(cfg)
    samples = cfg.data.prompts_per_step * group
    drawn = cfg.data.prompts_per_step * rollout.group_size
    explored = drawn if group < rollout.group_size else 0
    recorded = cfg.algorithm.recorded_steps(rollout)
    minibatch = samples // cfg.train.updates_per_rollout
    most = min(rollout.max_rows, minibatch)
    chunk = max(n for n in range(1, most + 1) if minibatch % n == 0)
    return Derived(
        samples=samples,
        explored=explored,
        minibatch_samples=minibatch,
        chunk_rows=chunk,
        recorded_steps=recorded,
        replays=samples * recorded,
        replay_rows=chunk * min(cfg.train.replay_steps, recorded),
        sampled_rows=(samples + explored) * rollout.steps * (1 if rollout.guidance == 1 else 2),
        evaluation_images=cfg.evaluation.prompts * cfg.evaluation.samples_per_prompt,
        total_samples=(samples + explored) * cfg.train.steps,
    )


def training(cfg: Config, processes: int) -> int:
    """How many of the processes train; ConfigError where the others would have none to serve."""
    rewards = cfg.processes.rewards
    if 2 * rewards > processes:
        raise ConfigError(
            [
                f"processes.rewards: got {rewards} of {processes} processes; each serves one or "
                f"more of those that train: start {2 * rewards} or more (torchrun "
                f"--nproc-per-node), or set it to {processes // 2} or less"
            ]
        )
    return processes - rewards


def require_work(cfg: Config, processes: int) -> None:
    """ConfigError where one of the processes would have nothing to do, or lack a neighbour."""
    size, sequence = derived(cfg), cfg.processes.sequence
    if processes % sequence:
        raise ConfigError(
            [
                f"processes.sequence: got {sequence} with {processes} processes; wanted a divisor "
                "of their number (torchrun --nproc-per-node N)"
            ]
        )
    chunks = size.minibatch_samples // size.chunk_rows
    if processes // sequence > chunks:
        several = f" in groups of {sequence}" if sequence > 1 else ""
        raise ConfigError(
            [
                f"processes: got {processes}{several}, and a minibatch of {size.minibatch_samples} "
                f"samples is drawn in {chunks} chunks of {size.chunk_rows}; start at most "
                f"{chunks * sequence}, or lower rollout.max_rows"
            ]
        )


def describe(cfg: Config) -> str:
    """Return the resolved recipe as YAML, then the derived sizes, as comments."""
    size = derived(cfg)
    rollout, train = cfg.rollout, cfg.train
    rows = [
        f"samples per update      {size.samples} = {cfg.data.prompts_per_step} prompts x "
        f"{trained_group(cfg)} samples, {rollout.height} x {rollout.width} px"
        + (f", the best and worst of {size.explored} drawn in fp8" if size.explored else ""),
        f"optimizer steps         {train.updates_per_rollout} per update, "
        f"{size.minibatch_samples} samples each",
        f"recorded steps          {size.recorded_steps} of {rollout.steps} per sample",
        f"replays per update      {size.replays} (sample, step) pairs, "
        f"{size.replay_rows} at a time",
        f"rollout rows per update {'at most ' if rollout.guidance_interval else ''}"
        f"{size.sampled_rows}, of {size.chunk_rows} samples at a time",
        f"whole run               {train.steps} updates, {size.total_samples} images",
        f"one evaluation          {size.evaluation_images} images",
        f"config hash             {config_hash(cfg)}",
    ]
    return _yaml(cfg) + "\n" + "\n".join(f"# {row}" for row in rows) + "\n"


def _yaml(cfg: Section) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(cfg.model_dump(mode="json")))


def save_resolved(cfg: Section, path: str | os.PathLike[str]) -> None:
    """Write the resolved recipe as YAML that `load_config` reads back; whole or not at all."""
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(_yaml(cfg), encoding="utf-8")
    beside.replace(path)


def settings(cfg: Section) -> dict[str, Any]:
    """Dotted key -> value of everything that changes the numbers of a step.

    Left out: UNHASHED (a failure stops a step or drops its groups), train.recompute_blocks,
    train.skip_flat, and train.steps, which only says when to end (not where train.decay counts down
    to it).
    """
    flat = _numbers(cfg.model_dump(mode="json"))
    if _open_ended(flat):
        flat.pop("train.steps", None)
    return flat


def _open_ended(flat: Mapping[str, Any]) -> bool:
    """True where no learning rate depends on train.steps, so that it may grow."""
    return flat.get("train.decay") == 0


def config_hash(cfg: Config) -> str:
    """Return the SHA-256 of `settings`."""
    return hashlib.sha256(json.dumps(settings(cfg), sort_keys=True).encode()).hexdigest()


def _numbers(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted key -> value of the keys that change numbers; empty sections stay as {}."""
    flat: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, Mapping) and value:
            for name, child in value.items():
                walk(child, f"{key}.{name}" if key else str(name))
        else:
            flat[key] = value

    plain = dict(plain)
    if isinstance(plain.get("judges"), Mapping):
        plain["judges"] = {
            name: {k: v for k, v in judge.items() if k not in OPERATIONAL}
            for name, judge in plain["judges"].items()
        }
    walk({name: value for name, value in plain.items() if name not in UNHASHED}, "")
    flat.pop("train.recompute_blocks", None)
    flat.pop("train.skip_flat", None)
    flat.pop("rollout.cuda_graphs", None)  # of checkpoints before rollout.denoise; changed no bit
    return flat


def changes(old: Section | Mapping[str, Any], new: Section) -> list[str]:
    """Return one line per key that changes the numbers: 'key: was X, is now Y'.

    old: settings, their `model_dump(mode="json")`, or their `settings` as kept in a checkpoint.
    A larger train.steps is no change where train.decay is 0; a smaller one is. Nor is a key that
    `old` lacks and that is at its default: there was none when that run was made.
    """
    before = _numbers(old.model_dump(mode="json") if isinstance(old, Section) else old)
    after = _numbers(new.model_dump(mode="json"))
    if "train.steps" not in before and _open_ended(after):
        after.pop("train.steps")
    chosen = _numbers(new.model_dump(mode="json", exclude_defaults=True))
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if key not in before and key not in chosen:
            continue
        was, now = before.get(key, "absent"), after.get(key, "absent")
        grown = key == "train.steps" and "absent" not in (was, now) and now >= was
        grown = grown and _open_ended(after)
        if was != now and not grown:
            lines.append(f"{key}: was {was!r}, is now {now!r}")
    return lines


def refuse_changes(old: Section | Mapping[str, Any], new: Section, where: str) -> None:
    """Raise ConfigError unless a run saved under `old` at `where` may go on under `new`."""
    lines = changes(old, new)
    if lines:
        mend = (
            f"{where} was made with other settings; go back to them, or start anew under run=NAME"
        )
        raise ConfigError([mend, *lines])
