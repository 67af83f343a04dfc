"""`python -m qirl_fast.curate [recipe.yaml] [key=value ...]`: which prompts are worth training on.

Takes the recipe of `qirl_fast.train` and its section `curation`. Draws curation.samples images of
every prompt of data.train from the base model, with the recipe's rollout and judges, and writes to
<output>/<run>-curation:
    scores.jsonl                 every score, one line a prompt, as they come
    kept.jsonl dropped.jsonl     the prompt rows as they were, with what was found under "curation"
    failed.jsonl                 rows that a judge failed on: neither kept nor dropped
    summary.json histogram.png strips.png images/   the verdicts in numbers and pictures
The same command goes on where it was killed, bit for bit, asks judges that failed again, and under
other thresholds decides anew without drawing anything.
"""

import hashlib
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from qirl_fast.batch import StepFailed
from qirl_fast.config import Config, ConfigError, load_config, save_resolved, settings
from qirl_fast.data.prompts import Prompt, PromptError
from qirl_fast.entry import run
from qirl_fast.evaluation.curation import (
    FAILED,
    KEPT,
    VERDICTS,
    Decision,
    Rules,
    annotated,
    decide,
    source_rows,
    statistics,
)
from qirl_fast.evaluation.scores import ScoreFile
from qirl_fast.evaluation.strips import Strip, examples, histogram, strips
from qirl_fast.models.fp8.te import Unavailable
from qirl_fast.rewards.composite import weights_for, without_missing
from qirl_fast.samples import BaseSamples
from qirl_fast.tiny import packaged
from qirl_fast.trainer import Trainer
from qirl_fast.whole import write_text

# Settings that decide what is drawn and scored; the others, such as the weights, may change.
DRAWING = ("seed", "device", "algorithm", "model", "rollout", "judges")
SHOWING = ("images", "buckets", "condition_pixels")
NOT_DRAWING = ("model.lora", "rollout.group_size")
SAY_EVERY_S = 10.0


def curate(cfg: Config, argv: Sequence[str] = ()) -> Path:
    """Curate by the recipe and return the folder; argv: the command's words, to name the next."""
    source = packaged(cfg.data.train)
    if source.suffix not in (".jsonl", ".txt"):
        wanted = "curation copies rows; wanted a .jsonl or .txt file"
        raise ConfigError([f"data.train: got {cfg.data.train!r}: {wanted}"])
    trainer = _trainer(cfg)
    left_out = sorted(trainer.sampler.dropped)
    usable = [i for i in range(len(trainer.sampler.prompts)) if i not in left_out]
    prompts = [trainer.sampler.prompts[i] for i in usable]
    folder = open_folder(cfg, source, left_out)
    names = list(trainer.judges.names)
    try:
        scores = ScoreFile(folder / "scores.jsonl", names, cfg.curation.samples)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    for text in trainer.judges.warnings():
        print(f"warning: {text}")
    if left_out:
        lines = ", ".join(str(i + 1) for i in left_out)
        print(f"warning: rows whose images cannot be used are in no file written here: {lines}")
    samples = BaseSamples(trainer, prompts, cfg.curation.samples, usable)
    try:
        seconds = draw(samples, scores, folder)
    finally:
        trainer.judges.abandon()
    scores.finish()
    try:
        decision = decide(
            scores.array(cfg.tiers, cfg.edit), _weights(cfg, prompts, scores), _rules(cfg)
        )
    except ValueError as error:
        raise StepFailed(f"{error}; the first reason: {_first_reason(scores)}") from error
    rows = source_rows(source)
    write(folder, [rows[i] for i in usable], scores, decision)
    picture(folder, samples, decision)
    trainer.close()
    summarise(folder, cfg, prompts, decision, names, seconds)
    _say_next(folder, cfg, prompts, decision, argv)
    return folder


def _trainer(cfg: Config) -> Trainer:
    try:
        return Trainer(cfg)
    except (ValueError, OSError, Unavailable) as error:
        raise ConfigError([str(error)]) from error


def open_folder(cfg: Config, source: Path, left_out: Sequence[int] = ()) -> Path:
    """<output>/<run>-curation, new or made with the same settings; ConfigError otherwise.

    left_out: rows of data.train without a usable image.
    """
    folder = Path(cfg.output) / f"{cfg.run}-curation"
    own = {
        key: value
        for key, value in settings(cfg).items()
        if key.split(".")[0] in DRAWING and not key.startswith(NOT_DRAWING)
    }
    own |= {"rewards and watch": [*cfg.rewards, *cfg.watch]}
    own |= {f"curation.{name}": getattr(cfg.curation, name) for name in ("samples", "images")}
    own |= {f"data.{name}": getattr(cfg.data, name) for name in SHOWING}
    own |= {"rows left out": list(left_out) or None}
    own |= {"sha256 of data.train": hashlib.sha256(source.read_bytes()).hexdigest()}
    path = folder / "settings.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            was = json.loads(path.read_text(encoding="utf-8"))
            changed = sorted(k for k in own.keys() | was.keys() if own.get(k) != was.get(k))
            if changed:
                lines = [f"{k}: was {was.get(k)!r}, is now {own.get(k)!r}" for k in changed]
                mend = "go back to them, or start anew under run=NAME"
                raise ConfigError([f"{folder} was made with other settings; {mend}", *lines])
        elif any(folder.iterdir()):
            raise ConfigError(
                [f"{folder} holds files and no settings.json; remove it, or choose run=NAME"]
            )
        else:
            write_text(path, json.dumps(own, indent=2) + "\n")
        save_resolved(cfg, folder / "config.resolved.yaml")
    except OSError as error:
        raise ConfigError([f"output: cannot write to {folder} ({error.strerror})"]) from error
    return folder


def draw(samples: BaseSamples, scores: ScoreFile, folder: Path) -> float:
    """Draw and judge every prompt that has no record, or a failed one; the seconds it took."""
    cfg, total = samples.trainer.cfg, len(samples.prompts)
    failed = [record.row for record in scores.records.values() if record.failed]
    left = sorted({*range(total)} - {*scores.records} | {*failed})
    print(
        f"{folder}: {total - len(left)} of {total} prompts have their scores"
        + (f"; {len(failed)} on which a judge failed are asked again" if failed else "")
    )
    pictured = set(np.linspace(0, total - 1, min(cfg.curation.images, total)).astype(int).tolist())
    begin = said = time.perf_counter()
    for done, drawn in enumerate(samples.of(left), start=1):
        if drawn.record.row in pictured:
            _save_images(folder / "images", drawn.record.row, drawn.images)
        scores.append(drawn.record)
        now = time.perf_counter()
        if now - said > SAY_EVERY_S or done == len(left):
            rest = (now - begin) / done * (len(left) - done)
            print(
                f"{total - len(left) + done}/{total} prompts, about {rest:.0f} s left", flush=True
            )
            said = now
    return time.perf_counter() - begin


def _save_images(folder: Path, row: int, images: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{row}-{i}.png")


def _weights(cfg: Config, prompts: Sequence[Prompt], scores: ScoreFile) -> np.ndarray:
    """Float64 [P, K], each row summing to 1; watched judges weigh 0."""
    rewards, samples = len(cfg.rewards), cfg.curation.samples
    rows = [p.category for p in prompts for _ in range(samples)]
    weights = weights_for(rows, cfg.rewards, cfg.category_weights, list(cfg.rewards))
    status = scores.status()[:, :, :rewards].reshape(-1, rewards)
    weights_PK = without_missing(weights, status, samples)[::samples].astype(np.float64)
    weights_PK /= weights_PK.sum(1, keepdims=True)
    return np.pad(weights_PK, ((0, 0), (0, len(cfg.watch))))


def _rules(cfg: Config) -> Rules:
    c = cfg.curation
    return Rules(c.threshold, c.quantile, c.drop_failed, c.drop_passed)


def _first_reason(scores: ScoreFile) -> str:
    for record in scores.ordered():
        for name, reasons in record.failures.items():
            return f"prompt {record.row + 1}, judge {name!r}: {next(iter(reasons.values()))}"
    return "a judge had nothing to judge"


def write(folder: Path, rows: Sequence[str], scores: ScoreFile, decision: Decision) -> None:
    """kept.jsonl, dropped.jsonl, failed.jsonl: each whole or not at all. rows: by record."""
    texts: dict[str, list[str]] = {"kept": [], "dropped": [], "failed": []}
    array = scores.array()
    for p, record in enumerate(scores.ordered()):
        verdict = decision.verdicts[p]
        found = statistics(decision, array, scores.names, p)
        if record.failures:
            found["failures"] = record.failures
        name = {KEPT: "kept", FAILED: "failed"}.get(verdict, "dropped")
        texts[name].append(annotated(rows[record.row], found) + "\n")
    for name, lines in texts.items():
        write_text(folder / f"{name}.jsonl", "".join(lines))


def picture(folder: Path, samples: BaseSamples, decision: Decision) -> None:
    """histogram.png and strips.png; what the strips show is drawn once more."""
    histogram(decision, folder / "histogram.png")
    groups = {
        heading: [
            Strip(samples.prompts[p].prompt, samples.alone(p), decision.reward[p].tolist())
            for p in chosen
        ]
        for heading, chosen in examples(decision).items()
    }
    strips(groups, folder / "strips.png")


def summarise(
    folder: Path,
    cfg: Config,
    prompts: Sequence[Prompt],
    decision: Decision,
    names: Sequence[str],
    seconds: float,
) -> None:
    """Write summary.json and print the table: prompts of each category by verdict."""
    pairs = Counter((p.category or "-", v) for p, v in zip(prompts, decision.verdicts, strict=True))
    categories = sorted({category for category, _ in pairs})
    counts = {c: {v: pairs[c, v] for v in VERDICTS} for c in categories}
    std = dict(zip(names, decision.std.tolist(), strict=True))
    summary: dict[str, Any] = {
        "prompts": len(prompts),
        "samples": cfg.curation.samples,
        "threshold": decision.threshold,
        "curation": cfg.curation.model_dump(mode="json"),
        "std": std,
        "verdicts": {v: decision.verdicts.count(v) for v in VERDICTS},
        "categories": counts,
        "drawing_s": seconds + _drawn_before(folder),
    }
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    table = Table(title=f"{len(prompts)} prompts x {cfg.curation.samples} samples")
    table.add_column("category")
    for name in ("prompts", *VERDICTS):
        table.add_column(name, justify="right")
    total = {v: decision.verdicts.count(v) for v in VERDICTS}
    for category, row in [*counts.items(), ("all", total)]:
        table.add_row(category, str(sum(row.values())), *(str(row[v]) for v in VERDICTS))
    console = Console()
    console.print(table)
    by = "" if cfg.curation.quantile is None else f" (quantile {cfg.curation.quantile:g})"
    print(f"threshold {decision.threshold:.4g} standard deviations{by}")
    for name in names:
        if std[name] == 0:
            print(f"judge {name!r} gave every sample the same score, so it entered no range")


def _drawn_before(folder: Path) -> float:
    """Seconds of earlier calls that came to their end."""
    path = folder / "summary.json"
    return float(json.loads(path.read_text())["drawing_s"]) if path.exists() else 0.0


def _say_next(
    folder: Path,
    cfg: Config,
    prompts: Sequence[Prompt],
    decision: Decision,
    argv: Sequence[str],
) -> None:
    kept, failed = decision.verdicts.count(KEPT), decision.verdicts.count(FAILED)
    print(f"pictures {folder / 'histogram.png'} {folder / 'strips.png'}")
    if failed:
        print(
            f"{failed} prompts lack a score, see {folder / 'failed.jsonl'}; the same command asks "
            "judges that failed again"
        )
    if kept == 0:
        print("nothing is kept, so there is nothing to train on: lower the threshold")
        return
    changed = ("data.train=", "run=", "curation.", "curation=")
    words = [word for word in argv if not word.startswith(changed)]
    words += [f"data.train={folder / 'kept.jsonl'}", f"run={cfg.run}-curated"]
    if cfg.data.images is None and any(p.images for p in prompts):
        words.append(f"data.images={packaged(cfg.data.train).parent}")
    if kept < cfg.data.prompts_per_step:
        words.append(f"data.prompts_per_step={kept}")
    print("train on the kept ones: python -m qirl_fast.train " + shlex.join(words))


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 1 stopped with its scores saved, 2 the settings are wrong."""

    def work(args: list[str]) -> None:
        curate(load_config(args), args)

    return run(
        argv,
        __doc__,
        work,
        wrong=(ConfigError, PromptError),
        stopped=StepFailed,
        again="run the same command again: the scores so far are kept",
    )


if __name__ == "__main__":
    sys.exit(main())
