"""`python -m qirl_fast.calibrate FOLDER [labels=FILE] [key=value ...]`: weights by category.

FOLDER is what `qirl_fast.curate` has written; its scores of the base model's samples are read, and
people's ratings of them where there are some (evaluation/ratings.py). Writes into FOLDER:
    weights.yaml      the recipe with the proposed category_weights, for people to edit and
                      `qirl_fast.train` to take as it is; the reason stands after each weight
    correlation.png   correlations between judges inside groups, by category
    calibration.json  every number
The equations are those of evaluation/calibration.py.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError
from rich.console import Console
from rich.table import Table

from qirl_fast.config import Config, ConfigError, load_config
from qirl_fast.config.wording import schema_of
from qirl_fast.entry import run
from qirl_fast.evaluation.calibration import (
    Agreement,
    Limits,
    agreement,
    centred,
    correlations,
    propose,
)
from qirl_fast.evaluation.curation import global_std
from qirl_fast.evaluation.proposal import Proposal, heat_map, recipe_yaml
from qirl_fast.evaluation.ratings import OVERALL, RatingError, load_ratings
from qirl_fast.evaluation.scores import ScoreFile
from qirl_fast.section import Level, Section, Text
from qirl_fast.whole import write_text


class Settings(Section):
    """The keys of the command."""

    labels: Text | None = Field(default=None, description="JSONL of people's ratings")
    floor: Level = Field(
        default=0.05,
        description="a judge is out of a category where its in-group std is below this share of "
        "its std",
    )
    min_labels: int = Field(default=20, ge=3, description="ratings that make an agreement")


def calibrate(folder: Path, keys: Settings) -> Path:
    """Write the proposal into the curation's folder; returns weights.yaml."""
    cfg, scores = read(folder)
    names, records = list(scores.names), scores.ordered()
    prompts = {record.row: record.prompt for record in records}
    ratings = {}
    if keys.labels is not None:
        ratings = load_ratings(keys.labels, prompts, scores.samples, names)
    s_PnK, raw_PnK = scores.array(cfg.tiers, cfg.edit), scores.array()
    categories = np.array([r.category or "" for r in records], object)
    std_K = global_std(s_PnK)
    limits = Limits(keys.floor, cfg.advantage.std_floor, keys.min_labels)
    proposals, tables = [], {"all": correlations(centred(s_PnK))}
    rewards = len(cfg.rewards)
    for name in sorted(set(categories)):
        own = categories == name
        people = [agreed(raw_PnK, ratings, names, k, own, keys.min_labels) for k in range(rewards)]
        mine = s_PnK[own][:, :, :rewards]
        weights = propose(mine, std_K[:rewards], people, names[:rewards], limits)
        outs = [f"{judge} {w.reason}" for judge, w in zip(names, weights, strict=False)]
        kept = "" if any(w.weight for w in weights) else f"the recipe's stay; {'; '.join(outs)}"
        proposals.append(Proposal(name or None, int(own.sum()), weights, kept))
        tables[name or "no category"] = correlations(centred(s_PnK[own]))
    return write(folder, cfg, proposals, tables, names, bool(ratings))


def agreed(
    s_PnK: np.ndarray,
    ratings: dict[str, np.ndarray],
    names: Sequence[str],
    k: int,
    own: np.ndarray,
    least: int,
) -> Agreement:
    """Judge k's agreement with people in the prompts `own`, or over all where these are too few."""
    if not ratings:
        return Agreement(None, 0, "no ratings came")
    table = ratings.get(names[k], ratings.get(OVERALL))
    if table is None:
        return Agreement(None, 0, "nobody rated what it judges")
    found = agreement(s_PnK[own, :, k], table[own], least)
    if found.value is not None or found.count >= least:
        return found
    wide = agreement(s_PnK[:, :, k], table, least)
    if wide.value is None:
        return found
    return Agreement(wide.value, wide.count, f"{wide.how} of all categories")


def read(folder: Path) -> tuple[Config, ScoreFile]:
    """The recipe and the scores of a curation. Raises ConfigError where there is none."""
    recipe, path = folder / "config.resolved.yaml", folder / "scores.jsonl"
    if not (recipe.is_file() and path.is_file()):
        raise ConfigError(
            [f"{folder}: no curation; wanted a folder that python -m qirl_fast.curate has written"]
        )
    cfg = load_config([str(recipe)])
    try:
        scores = ScoreFile(path, [*cfg.rewards, *cfg.watch], cfg.curation.samples)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    if not scores.records:
        raise ConfigError([f"{path}: holds no scores yet; let qirl_fast.curate finish"])
    return cfg, scores


def write(
    folder: Path,
    cfg: Config,
    proposals: Sequence[Proposal],
    tables: dict[str, np.ndarray],
    names: Sequence[str],
    rated: bool,
) -> Path:
    """weights.yaml, correlation.png, calibration.json and the table on the terminal."""
    path = folder / "weights.yaml"
    recipe = cfg.model_dump(mode="json", exclude_defaults=True)
    for key in ("run", "resume", "category_weights"):
        recipe.pop(key, None)
    head = (
        f"# Proposed by qirl_fast.calibrate from {folder}/scores.jsonl; edit as you like, then\n"
        f"#   python -m qirl_fast.train {path}\n"
        "# Weights of a category sum to 1; after each stands its reason."
    )
    if not rated:
        head += (
            "\n# No ratings came: the weights say how much each judge tells apart inside a group,"
            "\n# not how much people care for it."
        )
    write_text(path, recipe_yaml(recipe, proposals, list(cfg.rewards), head))
    heat_map(tables, names, folder / "correlation.png")
    report: dict[str, Any] = {
        "correlations": {name: _plain(table) for name, table in tables.items()},
        "judges": list(names),
        "categories": [asdict(proposal) for proposal in proposals],
    }
    write_text(folder / "calibration.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    table = Table(title=f"proposed weights, {folder.name}")
    for column in ("category", "prompts", "judge", "weight", "why"):
        table.add_column(column, justify="right" if column in ("prompts", "weight") else "left")
    for p in proposals:
        for i, (judge, w) in enumerate(zip(cfg.rewards, p.weights, strict=True)):
            first = (p.category or "-", str(p.prompts)) if i == 0 else ("", "")
            number = "kept" if p.kept else f"{w.weight:.3f}"
            table.add_row(*first, judge, number, w.reason)
    console = Console()
    console.print(table)
    console.print(f"recipe {path}\npicture {folder / 'correlation.png'}", soft_wrap=True)
    return path


def _plain(table: np.ndarray) -> list[list[float | None]]:
    return [[None if np.isnan(v) else float(v) for v in row] for row in table]


def parse(args: Sequence[str]) -> tuple[Path, Settings]:
    """The folder and the settings of a command line. Raises ConfigError."""
    folders = [arg for arg in args if "=" not in arg]
    if len(folders) != 1:
        raise ConfigError([f"got {len(folders)} folders; wanted one, of a curation"])
    try:
        words = [arg for arg in args if "=" in arg]
        plain = OmegaConf.to_container(OmegaConf.from_dotlist(words))
        return Path(folders[0]), Settings.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(schema_of(Settings).error_lines(error.errors())[0]) from error
    except OmegaConfBaseException as error:
        raise ConfigError([" ".join(str(error).split())]) from error


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 2 what came is wrong."""

    def work(args: list[str]) -> None:
        calibrate(*parse(args))

    return run(argv, __doc__, work, wrong=(ConfigError, RatingError))


if __name__ == "__main__":
    sys.exit(main())
