"""`python -m qirl_fast.train_reward RECIPE.yaml [key=value ...] [--dry-run]`: fine-tune a judge.

A Qwen3-VL or Qwen2.5-VL learns to reason about an image and to give a score token whose expected
value is what people said. Writes <output>/<run>/judge, which `kind: vlm` loads, with
validation.json: its agreement with people on held-out prompts. A run killed at any moment goes on
with resume=auto, bit for bit.
"""

import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from qirl_fast.checkpoint import (
    find_latest,
    load_checkpoint,
    pack,
    save_checkpoint,
    unpack,
)
from qirl_fast.config import refuse_changes, settings
from qirl_fast.config.load import load_settings
from qirl_fast.config.reward import RewardConfig
from qirl_fast.entry import run
from qirl_fast.reward_trainer import (
    RewardTrainer,
    TrainingFailed,
    place_of,
    read_data,
    rubrics_of,
)
from qirl_fast.rewards.judge import SOURCES
from qirl_fast.rewards.vlm.images import read_image
from qirl_fast.rewards.vlm.local import Settings, Vlm
from qirl_fast.rewards.vlm.rows import Judgement
from qirl_fast.rewards.vlm.score import Reading
from qirl_fast.rewards.vlm.scorer import Scorer
from qirl_fast.run_folder import prepare_run_dir
from qirl_fast.tracking import Tracker

USAGE = f"""{__doc__}
  key=value    any setting by its dotted name, e.g. seed=1 run=mine train.steps=200
  --dry-run    read and check everything, print the settings and what would be trained; then stop
"""


def train(cfg: RewardConfig) -> Path:
    """Fine-tune by the recipe and return the judge's folder."""
    fresh = not any(Path(cfg.output, cfg.run).glob("*"))
    run_dir = prepare_run_dir(cfg)
    try:
        trainer = RewardTrainer(cfg)
        step = resume(trainer, run_dir, cfg)
    except BaseException:
        if fresh:
            shutil.rmtree(run_dir)  # nothing was computed: the mended command finds its place free
        raise
    with Tracker(run_dir, cfg, step=step) as tracker:
        tracker.say(f"{run_dir}: from step {step} to {cfg.train.steps}")
        for update in range(step + 1, cfg.train.steps + 1):
            with tracker.phase("update"):
                metrics = trainer.update(update)
            if due(update, cfg.validation.every, 0):
                with tracker.phase("heldout"):
                    metrics |= trainer.heldout()
            tracker.log(update, metrics, images=cfg.train.batch)
            if due(update, cfg.tracking.checkpoint_every, cfg.train.steps):
                tensors, tree = pack(trainer.state())
                state = {"tree": tree, "config": settings(cfg), "data": trainer.digests}
                keep = cfg.tracking.keep_checkpoints
                save_checkpoint(run_dir, update, tensors, state, None, keep)
        judge = run_dir / "judge"
        trainer.export(judge)
        trainer.close()
        rows, device = trainer.heldout_rows(), trainer.device
        del trainer  # its memory is for the judge that is validated, the one on disk
        tracker.say(f"{judge} is written; validating it on {len(rows)} held-out rows")
        tracker.say(validate(cfg, judge, rows, device))
    return judge


def due(update: int, every: int, last: int) -> bool:
    """True at every `every`-th update and at the last one; 0: at the last one only."""
    return update == last or (every > 0 and update % every == 0)


def resume(trainer: RewardTrainer, run_dir: Path, cfg: RewardConfig) -> int:
    """Load what `resume` asks for and return its step; 0 where there is nothing to resume."""
    if cfg.resume == "never":
        return 0
    found = find_latest(run_dir) if cfg.resume == "auto" else load_checkpoint(Path(cfg.resume))
    if found is None:
        return 0
    refuse_changes(found.state["config"], cfg, f"resume: {found.path}")
    kept = found.state.get("data", {})
    changed = [name for name, now in trainer.digests.items() if kept.get(name) != now]
    if changed:
        raise ValueError(
            f"resume: {found.path} was made from other {' and '.join(changed)} rows than those "
            f"that data.file, {cfg.data.file}, now holds (texts, scores, images or their order); "
            "restore the file and its images, or start anew under run=NAME"
        )
    trainer.load_state(unpack(found.tensors, found.state["tree"]))
    return found.step


def validate(cfg: RewardConfig, folder: Path, rows: Sequence[Judgement], device: str) -> str:
    """Judge the held-out rows with the judge in the folder, as RL would, and write validation.*.

    Returns what came of it, in words. Rows that the judge failed on are left out and counted; rows
    whose repeats alone failed are kept without repeats.
    """
    if not rows:
        return "no held-out rows: validation.json is not written; this judge's agreement is unknown"
    from qirl_fast.evaluation.agreement import write_validation

    judged, failed = judge_rows(cfg, folder, rows, device)
    if not judged:
        return f"validation.json is not written: all rows failed, the first with: {failed[0]}"
    tree = write_validation(judged, folder, n_boot=cfg.validation.bootstrap, seed=cfg.seed)
    bad = len(rows) - len(judged)
    lines = [f"validation: {folder / 'validation.md'}; {bad} of {len(rows)} rows failed"]
    if len(failed) > bad:
        lines[0] += f", {len(failed) - bad} more in their repeats"
    lines += [f"  failed: {reason}" for reason in failed[:3]]
    for name, group in tree["dimensions"].items():
        found = group["spearman"]
        value, low, high = (
            "undefined" if found[k] is None else f"{found[k]:.3f}" for k in ("value", "low", "high")
        )
        lines.append(f"  {name}: Spearman {value} (95 % {low} to {high}), {group['n']} rows")
        if again := group["repeats"]["n"]:
            icc, sd = (
                "undefined" if found["value"] is None else f"{found['value']:.3f}"
                for found in (group["repeats"]["icc"], group["repeats"]["within_sd"])
            )
            lines.append(f"    repeats: ICC {icc}, deviation within a row {sd}, {again} rows")
    return "\n".join(lines)


def judge_rows(
    cfg: RewardConfig, folder: Path, rows: Sequence[Judgement], device: str
) -> tuple[list[Any], list[str]]:
    """(Judged items, reasons of failed rows) of the judge in the folder, dimension by dimension.

    Rows whose repeats failed are among both.
    """
    from qirl_fast.evaluation.agreement import Judged

    how = cfg.validation
    judged, failed = [], []
    for dimension in sorted({row.dimension for row in rows}):
        judge = Vlm(
            Settings.model_validate(
                {
                    "kind": "vlm",
                    "path": str(folder),
                    "dimension": dimension,
                    "reasonings": how.reasonings,
                    "temperature": how.temperature,
                    "max_new_tokens": how.max_new_tokens,
                    "dtype": cfg.model.dtype,
                }
            ),
            device,
        )
        again = Scorer(judge.engine, replace(judge.how, reasonings=how.repeats))
        own = [row for row in rows if row.dimension == dimension]
        repeated = len(own[: how.repeat_rows or None]) if how.repeats else 0
        for number, row in enumerate(own):
            readings, why = judge_row(judge, row)
            if why is not None:
                failed.append(f"{row.where}: {why}")
                continue
            others = readings if len(readings) > 1 else ()
            if number < repeated:
                others, why = judge_row(again, row)
                failed += [] if why is None else [f"{row.where}: its repeats: {why}"]
            probs = np.mean([reading.p for reading in readings], axis=0)
            judged.append(
                Judged(
                    truth=row.score,
                    predicted=float(np.mean([reading.value for reading in readings])),
                    dimension=dimension,
                    category=row.category,
                    cluster=row.cluster,
                    repeats=tuple(reading.value for reading in others),
                    probs=tuple(map(float, probs)),
                )
            )
    return judged, failed


def judge_row(judge: Scorer, row: Judgement) -> tuple[tuple[Reading, ...], str | None]:
    """The judge's readings of a row, or why there are none."""
    *sources, image = (read_image(path) for path in row.images)
    scored = judge.score_rows([image], [{"prompt": row.text, SOURCES: sources}])
    return judge.repeats[0], scored.reasons.get(0)


def plan(cfg: RewardConfig) -> str:
    """The resolved recipe, then what the data amount to, as comments."""
    splits = read_data(cfg)
    rows = [*splits["train"], *splits["heldout"]]
    epochs = cfg.train.steps * cfg.train.batch / len(splits["train"])
    lines = [f"epochs      {epochs:.2f} of {len(splits['train'])} rows"]
    for name, part in splits.items():
        counts = Counter(row.dimension for row in part)
        shown = ", ".join(f"{count} {dimension}" for dimension, count in sorted(counts.items()))
        prompts = len({row.cluster for row in part})
        lines.append(f"{name:<12}{len(part)} rows of {prompts} prompts: {shown or 'none'}")
    first = splits["train"][place_of(0, len(splits["train"]), cfg.seed)]
    lines.append(f"first row   {first.where}")
    lines += [f"{name}: {text}" for name, text in rubrics_of(cfg, rows).items()]
    yaml = OmegaConf.to_yaml(OmegaConf.create(cfg.model_dump(mode="json")))
    return yaml + "\n" + "\n".join(f"# {line}" for line in lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 1 the run stopped, 2 the settings or the data are wrong."""

    def work(args: list[str]) -> None:
        cfg = load_settings([arg for arg in args if arg != "--dry-run"], RewardConfig)
        if "--dry-run" in args:
            print(plan(cfg))
        else:
            train(cfg)

    return run(
        argv,
        USAGE,
        work,
        wrong=(ValueError, FileNotFoundError),
        stopped=TrainingFailed,
        again="run the same command with resume=auto",
    )


if __name__ == "__main__":
    sys.exit(main())
