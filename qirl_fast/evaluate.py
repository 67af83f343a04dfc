"""`python -m qirl_fast.evaluate [evaluate.yaml] [key=value ...]`: several models, one prompt file.

    refuse what cannot be compared; check the prompts against what the models were trained on
    for each model: draw what is not in the cache, judge every image
    compare, correct, plan; write <output>/evaluation.json, .md, .csv and .png, and <output>/arena

Every model draws the same prompts from the same noise. The same command goes on where it was killed
and, where nothing has changed, draws nothing. Settings: qirl_fast/config/evaluate.py; what the
numbers mean: docs/evaluation.md.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qirl_fast import configs_dir
from qirl_fast.arena.folders import write_study
from qirl_fast.conditioning import shown_size
from qirl_fast.config import ConfigError, load_settings
from qirl_fast.config.evaluate import EvaluateConfig
from qirl_fast.config.files import make_folder
from qirl_fast.contest.contenders import Contender, contenders, size_of, training_files
from qirl_fast.contest.drawings import Artist, Judged
from qirl_fast.contest.results import Columns, columns, leaks_told, prompts_told, results
from qirl_fast.data.prompts import Prompt, PromptError, load_prompts
from qirl_fast.data.sources import ImageError
from qirl_fast.entry import run
from qirl_fast.evaluation.contest_report import csv_text, leak_lines, markdown, plan_lines, tables
from qirl_fast.evaluation.facet_judge import FacetJudge, taxonomy_of
from qirl_fast.evaluation.grid import image_grid
from qirl_fast.evaluation.leaks import EXACT, Leak, find_leaks
from qirl_fast.heldout_samples import EvaluationFailed
from qirl_fast.models import adapter_of
from qirl_fast.rewards.judge import SOURCES, Sources
from qirl_fast.rewards.judges import Judges
from qirl_fast.rewards.vlm.checklist import build_engine
from qirl_fast.rollout.workers import Workers, cpu_workers
from qirl_fast.tiny import packaged
from qirl_fast.whole import write_text

DEFAULT = "tiny_evaluate.yaml"
PICTURED = 8  # prompts in the picture
WIDTH = 150  # columns of the widest table
BLANK = np.zeros((64, 64, 3), np.uint8)  # in place of condition images, which no row check reads


def evaluate(cfg: EvaluateConfig) -> Path:
    """Evaluate by the settings and return the folder of the tables."""
    prompts = load_prompts(packaged(cfg.prompts), cfg.images)
    if cfg.count is not None and cfg.count > len(prompts):
        raise ConfigError([f"count: got {cfg.count}; {cfg.prompts} has {len(prompts)} prompts"])
    prompts = prompts[: cfg.count]
    models = contenders(cfg)
    size = size_of(cfg, models)
    notes = [*alike(models), *checked_prompts(cfg, models, prompts, size)]
    device = device_of(cfg)
    try:
        judges = Judges(cfg.asked, cfg.judges, device, cfg.failures.reask)
        facets = facet_judge(cfg, device)
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError([str(error)]) from error
    require_rows(prompts, judges, facets)
    leaks = leaks_of(cfg, models, prompts)
    make_folder(Path(cfg.output))
    for line in [*notes, *leak_lines(leaks)]:
        print(line)
    workers = cpu_workers(cfg.threads) if device == "cpu" else Workers(1)
    artist = Artist(cfg, size, prompts, judges, facets, workers, device)
    try:
        judged = {model.name: artist.judged(model) for model in models}
    finally:
        artist.close()
    found = columns(cfg.asked, judged, cfg.samples_per_prompt, cfg.failures.budget)
    told = {
        "prompts": prompts_told(cfg, prompts, size, notes),
        "seeds": {"seed": cfg.seed, "samples_per_prompt": cfg.samples_per_prompt},
        "leaks": leaks,
        **results(cfg, models, prompts, judged, found),
        "settings": cfg.model_dump(mode="json", exclude={"threads", "output", "cache"}),
    }
    folder = Path(cfg.output)
    write(folder, told, prompts, judged, found)
    if len(models) > 1:
        others = [model.name for model in models if model.name != cfg.reference]
        drawn = {
            name: [(p, own.first[i]) for i, p in enumerate(prompts)] for name, own in judged.items()
        }
        write_study(folder / "arena", drawn, [cfg.reference, *others])
        print(f"for blind votes of people: python -m qirl_fast.arena {folder}")
    return folder


def alike(models: Sequence[Contender]) -> Iterator[str]:
    """Models that are one under two names."""
    seen: dict[tuple[str, float, int], str] = {}
    for model in models:
        first = seen.setdefault((model.weights, model.guidance, model.steps), model.name)
        if first != model.name:
            yield f"{model.name} and {first} are the same weights, guidance and steps"


def device_of(cfg: EvaluateConfig) -> str:
    """Where to compute. ConfigError for a GPU that is not there."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.device == "cuda" and best == "cpu":
        raise ConfigError(["device: got cuda, and there is none here; allowed: cpu, auto"])
    return best if cfg.device == "auto" else cfg.device


def facet_judge(cfg: EvaluateConfig, device: str) -> FacetJudge | None:
    """The judge of facets, None where none is asked for. ValueError, OSError: it cannot be."""
    if cfg.facets is None:
        return None
    taxonomy = taxonomy_of(cfg.facets.rubric)
    return FacetJudge(build_engine(cfg.facets.judge, device), taxonomy, cfg.facets.tries)


def checked_prompts(
    cfg: EvaluateConfig,
    models: Sequence[Contender],
    prompts: Sequence[Prompt],
    size: tuple[int, int],
) -> Iterator[str]:
    """What is to be said of the prompts. ConfigError for prompts that some model cannot draw."""
    if len(prompts) < 2:
        raise ConfigError([f"prompts: {cfg.prompts} gives {len(prompts)}; an interval needs two"])
    edits = [i for i, p in enumerate(prompts) if p.images]
    texts = [i for i, p in enumerate(prompts) if not p.images]
    for model in models:
        kind = adapter_of(model.folder, "auto")
        if edits and not kind.takes_images():
            what = f"row {edits[0] + 1} has a condition image"
            raise ConfigError([f"models.{model.name}: draws from text alone, and {what}"])
        if texts and kind.needs_images:
            what = f"row {texts[0] + 1} has no condition image"
            raise ConfigError([f"models.{model.name}: only edits images, and {what}"])
    repeats = len(prompts) - len({(p.prompt, p.images) for p in prompts})
    if repeats:
        yield f"{repeats} of {len(prompts)} prompts repeat an earlier one"
    try:
        shown = {i: shown_size(prompts[i].images[-1]) for i in edits}
    except ImageError as error:
        raise ConfigError([f"prompts: {error}"]) from error
    other = [i for i, (h, w) in shown.items() if h * size[1] != w * size[0]]
    if other and cfg.buckets is None:
        h, w = shown[other[0]]
        yield (
            f"{len(other)} of {len(edits)} edits have a source of another aspect ratio than "
            f"{size[0]} x {size[1]} (row {other[0] + 1}: {h} x {w}, height x width); all are drawn "
            "at that one size, and judges see the source stretched to it: set buckets to draw each "
            "at its own"
        )


def require_rows(prompts: Sequence[Prompt], judges: Judges, facets: FacetJudge | None) -> None:
    """ConfigError where a judge refuses a row, or could score none."""
    rows = [
        p.metadata | ({SOURCES: Sources([BLANK] * len(p.images))} if p.images else {})
        for p in prompts
    ]
    problems: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        for judge, why in judges.check_row(row, {}):
            problems.setdefault(judge, f"row {number}: judge {judge!r} cannot score it: {why}")
        try:
            if facets is not None:
                facets.check_row(row)
        except ValueError as error:
            problems.setdefault("facets", f"row {number}: {error}")
    for judge, why in judges.useless(rows):
        text = f"judge {judge!r} can score none of these rows; the first: {why}"
        problems.setdefault(judge, text)
    if problems:
        raise ConfigError([f"prompts: {text}" for text in problems.values()])


def leaks_of(
    cfg: EvaluateConfig, models: Sequence[Contender], prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """Check the prompts against training prompts. ConfigError where leaks end the evaluation."""
    own: dict[str, dict[str, tuple[str, str | None]]] = {m.name: training_files(m) for m in models}
    if cfg.training:
        own["settings"] = {path: (path, None) for path in cfg.training}
    found: dict[str, list[Leak]] = {}
    checked: dict[str, dict[str, tuple[int, str]]] = {name: {} for name in own}
    for name, sources in own.items():
        for source, (path, images) in sources.items():
            try:
                trained = load_prompts(packaged(path), images)
            except PromptError as error:
                if name == "settings":
                    raise
                checked[name][source] = (0, str(error))
                continue
            checked[name][source] = (len(trained), "")
            if source not in found:
                found |= {source: find_leaks(prompts, {source: trained}, cfg.near)}
    exact = [leak for of_source in found.values() for leak in of_source if leak.kind in EXACT]
    if exact and cfg.leaks == "stop":
        one = exact[0]
        raise ConfigError(
            [
                f"leaks: {len(exact)} evaluated prompts were trained on; the first, row "
                f"{one.index + 1}, is the same {one.kind} as one of {one.source}: {one.prompt!r}; "
                "take them out, or set leaks=say"
            ]
        )
    return leaks_told(found, checked, cfg.near)


def write(
    folder: Path,
    told: Mapping[str, Any],
    prompts: Sequence[Prompt],
    judged: Mapping[str, Judged],
    found: Columns,
) -> None:
    """evaluation.json, .md, .csv and .png, each whole or not at all; the same is printed."""
    write_text(folder / "evaluation.json", json.dumps(told, indent=1, allow_nan=False) + "\n")
    write_text(folder / "evaluation.md", markdown(told))
    write_text(folder / "evaluation.csv", csv_text(prompts, found.scores, found.states))
    first, shown = next(iter(found.scores.values())), range(min(PICTURED, len(prompts)))
    image_grid(
        {m: [np.array(Image.open(own.first[i])) for i in shown] for m, own in judged.items()},
        [prompts[i].prompt for i in shown],
        {model: first[model][: len(shown), 0] for model in judged},
        folder / "evaluation.png",
    )
    show(told)
    for name in ("json", "md", "csv", "png"):
        print(folder / f"evaluation.{name}")


def show(told: Mapping[str, Any]) -> None:
    """Print the tables and the planner's sentences."""
    console = Console(width=max(Console().width, WIDTH))
    for title, names, rows, _ in tables(told):
        table = Table(title=Text(title))
        for i, name in enumerate(names):
            table.add_column(Text(name), justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    for line in plan_lines(told):
        print(line)
    for one in told["failures"]:
        print(f"{one['judge']} failed on {one['images']} images of {one['model']}: {one['reason']}")


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 1 a judge or a model failed, 2 the settings are wrong."""

    def work(args: list[str]) -> None:
        evaluate(load_settings(args, EvaluateConfig, configs_dir() / DEFAULT))

    return run(
        argv,
        __doc__,
        work,
        wrong=(ConfigError, PromptError),
        stopped=(EvaluationFailed, OSError),
        again="run the same command again: images that were drawn are kept",
    )


if __name__ == "__main__":
    sys.exit(main())
