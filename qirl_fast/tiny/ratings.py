"""A simulated rating set for the tiny judge: pictures, noisy 1-5 ratings, true reasons.

The truth is programmatic: t = 1 + 4 a, with a in [0, 1] of `rewards/alignment.py`. Each picture is
rated by `raters_each` of `raters` simulated people:
    rating = clip(round(t + bias_r + e), 1, 5),  bias_r ~ N(0, BIAS), e ~ N(0, NOISE)
and its score is their mean. The rationale is free of that noise: what is seen in each quarter, then
for every wish of the prompt, in its order, whether it is met.

Half of the pictures are drawn from scenes, right, misread, lacking or crowded, and spoiled; the
other half are the packaged tiny model's own samples, by the ODE and by the SDE that GRPO explores
with. Held-out rows are of the packaged held-out prompts; no training row is of a scene that a
packaged held-out or validation prompt asks for, in whatever words.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr

from qirl_fast.models import load_model
from qirl_fast.rewards import alignment
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.sample import Sampling, sample
from qirl_fast.tiny import packaged, pictures, scenes
from qirl_fast.tiny.scenes import NUMBERS, Row

Report = Callable[[str, int, int, dict[str, float]], None]

BIAS, NOISE = 0.35, 0.8
MET, PARTLY = 0.75, 0.3  # credits from which a wish is met, or partly so
KINDS = {"right": 0.3, "misread": 0.4, "lacking": 0.1, "crowded": 0.1, "other": 0.1}
EXTRA = ("none", "one", "two", "many")
PER_PROMPT = 4  # pictures of one prompt in a row: model samples of a group


@dataclass(frozen=True)
class Recipe:
    """Sizes of one rating set."""

    seed: int = 0
    train: int = 6400
    heldout: int = 384
    from_model: float = 0.5
    raters: int = 12
    raters_each: int = 2


@dataclass(frozen=True)
class Rated:
    """One line of the set. picture: uint8 [64, 64, 3]. truth: in [1, 5]. ratings: whole numbers."""

    row: Row
    picture: np.ndarray
    truth: float
    rationale: str
    ratings: tuple[int, ...]
    split: str

    @property
    def score(self) -> float:
        return float(np.mean(self.ratings))


def judge(picture: np.ndarray, row: Row) -> tuple[float, str]:
    """(truth in [1, 5], rationale) of a picture uint8 [64, 64, 3] and its row."""
    known = alignment.explain(picture, row)
    seen = pictures.words(pictures.seen(known["found"]))
    checks = ", ".join(_checks(row["include"], known["entries"]))
    extra = EXTRA[min(3, round(known["extra"]))]
    return 1.0 + 4.0 * float(known["score"]), f"{seen} {checks}, extra {extra}."


def _checks(include: Sequence[Row], credits: Sequence[dict[str, float]]) -> Iterator[str]:
    """'two no', 'red yes', 'circle partly', 'above no': the wishes in the prompt's order."""
    related = len(include) == 2 and bool(include[1].get("position"))
    order = (1, 0) if related else range(len(include))
    for i in order:
        entry, credit = include[i], credits[i]
        if "count" in credit:
            yield f"{NUMBERS[entry['count']]} {_verdict(credit['count'])}"
        if "color" in credit:
            yield f"{entry['color']} {_verdict(credit['color'])}"
        yield f"{entry['class']} {_verdict(credit['shape'])}"
        if "position" in credit:
            yield f"{entry['position'][0]} {_verdict(credit['position'])}"


def _verdict(credit: float) -> str:
    return "yes" if credit >= MET else "partly" if credit >= PARTLY else "no"


def rate(truth: float, biases: np.ndarray, rng: np.random.Generator) -> tuple[int, ...]:
    """Whole ratings 1..5 of raters with these biases."""
    heard = truth + biases + rng.normal(0.0, NOISE, len(biases))
    return tuple(int(r) for r in np.clip(np.floor(heard + 0.5), 1, 5))


def draw(row: Row, rng: np.random.Generator) -> np.ndarray:
    """A picture for a row, uint8 [64, 64, 3]: its scene, or one misread, lacking, crowded."""
    kind = rng.choice(
        ("right", "misread", "lacking", "crowded", "other"), p=(0.3, 0.4, 0.1, 0.1, 0.1)
    )
    if kind == "other":
        shapes = pictures.random_scene(rng)
    else:
        asked = row if kind == "right" else scenes.misread(row, rng.uniform(0.2, 0.8), rng)
        shapes = scenes.sample_scene(asked, rng)
    if kind == "lacking":
        shapes.pop(rng.integers(len(shapes)))
    if kind == "crowded":
        taken = {int(s.x >= pictures.HALF) + 2 * int(s.y >= pictures.HALF) for s in shapes}
        free = [cell for cell in range(4) if cell not in taken]
        shapes += [pictures.random_shape(cell, rng) for cell in free[: rng.integers(1, 3)]]
    strength = 0.0 if rng.random() < 0.25 else rng.uniform(0.2, 1.0)
    picture = pictures.spoil(shapes, strength, rng)
    if shapes:
        return picture
    grain = rng.integers(
        -3, 4, picture.shape
    )  # clean empty ones would be one picture, in two splits
    return np.clip(picture + grain, 0, 255).astype(np.uint8)


def model_samples(rows: Sequence[Row], seed: int, report: Report) -> np.ndarray:
    """PER_PROMPT pictures by the packaged tiny model for each row, uint8 [rows * PER_PROMPT, ...].

    The first half by the ODE, the second by the recipe of configs/tiny_grpo.yaml.
    """
    model = load_model(packaged("tiny"), "auto", torch.float32, "cpu")
    size = scenes.SIZE
    how = Sampling(
        size,
        size,
        6,
        Guidance(1.5, model.norm_rescaled_guidance, "frozen_offset"),
        dynamics="flow_sde",
        eta=0.9,
        max_rows=120,
    )
    drawn: list[np.ndarray] = []
    with torch.no_grad():
        null = model.encode([""])[0]
        for update, part in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
            if not part:
                continue
            embeddings = list(model.encode([row["prompt"] for row in part]))
            trajectories = sample(
                model,
                embeddings,
                null,
                how,
                dict(model.pipeline.scheduler.config),
                group_size=PER_PROMPT,
                seed=seed,
                update=update,
                recorded=range(3) if update else (),
            )
            for chunk in trajectories:
                drawn += list(model.decode(chunk.latents, size, size))
                report("model samples", len(drawn), len(rows) * PER_PROMPT, {})
    return np.stack(drawn)


def prompts() -> dict[str, list[Row]]:
    """Rows that training and held-out judgements may be about."""
    splits = scenes.split_rows()
    kept = {scenes.scene_key(row) for name in ("heldout", "validation") for row in splits[name]}
    train = [row for row in scenes.all_rows() if scenes.scene_key(row) not in kept]
    return {"train": train, "heldout": splits["heldout"]}


def rated(recipe: Recipe, report: Report) -> list[Rated]:
    """The whole set, a function of the recipe alone."""
    rng = np.random.default_rng([recipe.seed, 11])
    biases = rng.normal(0.0, BIAS, recipe.raters)
    found = []
    for split, count in (("train", recipe.train), ("heldout", recipe.heldout)):
        by_tag = {
            tag: [row for row in prompts()[split] if row["tag"] == tag] for tag in scenes.TAGS
        }
        groups = -(-count // PER_PROMPT)
        rows = [scenes.sample_row(by_tag, rng) for _ in range(groups)]
        own = round(recipe.from_model * groups)
        samples = (
            model_samples(rows[:own], recipe.seed + (split == "heldout"), report) if own else ()
        )
        for i in range(count):
            row = rows[i // PER_PROMPT]
            picture = samples[i] if i < own * PER_PROMPT else draw(row, rng)
            truth, rationale = judge(picture, row)
            who = rng.choice(recipe.raters, recipe.raters_each, replace=False)
            ratings = rate(truth, biases[who], rng)
            found.append(Rated(row, picture, truth, rationale, ratings, split))
            report(split, i + 1, count, {})
    return found


def write(items: Sequence[Rated], folder: Path) -> dict[str, Any]:
    """ratings.jsonl (the format of train_reward), truth.jsonl and images/ under `folder`.

    Returns, and writes to ratings.json, what is known of the noise: by split the count and the
    Spearman correlation of the score with the truth, which bounds that of any judge with the score.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines, truths = [], []
    for i, item in enumerate(items):
        name = f"images/{i:05d}.png"
        Image.fromarray(item.picture).save(folder / name)
        lines.append(
            {
                "image": name,
                "prompt": item.row["prompt"],
                "dimension": "alignment",
                "rationale": item.rationale,
                "score": item.score,
                "category": item.row["tag"],
                "split": item.split,
            }
        )
        truths.append(
            {"image": name, "truth": item.truth, "ratings": item.ratings, "row": item.row}
        )
    for name, data in (("ratings", lines), ("truth", truths)):
        text = "".join(json.dumps(line) + "\n" for line in data)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    noise: dict[str, Any] = {"bias": BIAS, "noise": NOISE}
    for split in ("train", "heldout"):
        part = [item for item in items if item.split == split]
        if len(part) > 1:
            ceiling = spearmanr([i.truth for i in part], [i.score for i in part]).statistic
            noise[split] = {"rows": len(part), "spearman_truth_score": float(ceiling)}
    (folder / "ratings.json").write_text(json.dumps(noise, indent=2) + "\n", encoding="utf-8")
    return noise
