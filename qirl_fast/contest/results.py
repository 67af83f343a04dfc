"""From judged images to what evaluation.json says of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qirl_fast.conditioning import shown_size
from qirl_fast.config.evaluate import FACETS, EvaluateConfig
from qirl_fast.contest.contenders import Contender
from qirl_fast.contest.drawings import Judged
from qirl_fast.data.buckets import bucket_of
from qirl_fast.data.prompts import Prompt
from qirl_fast.evaluation.contest import (
    accuracies,
    by_category,
    compared,
    pairs_of,
    prompt_means,
)
from qirl_fast.evaluation.facets import Answers, points, table
from qirl_fast.evaluation.leaks import Leak
from qirl_fast.heldout_samples import EvaluationFailed
from qirl_fast.rewards.judge import FAILED, MISSING, SCORED
from qirl_fast.tiny import packaged

RIGHT = 1.0  # of text: every letter is there


@dataclass(frozen=True)
class Columns:
    """Scores float64 [P, S], NaN for none, and states int8 [P, S], by judge and model.

    Points of facets stand beside the judges: "facets" the overall, "facets/<pillar>" each pillar.
    """

    scores: dict[str, dict[str, np.ndarray]]
    states: dict[str, dict[str, np.ndarray]]


def columns(
    names: Sequence[str], judged: Mapping[str, Judged], samples: int, budget: float
) -> Columns:
    """Of every model. EvaluationFailed where a judge failed on more than a share `budget`."""
    found = Columns({}, {})
    for k, name in enumerate(names):
        for model, own in judged.items():
            status = own.verdict.status[:, k]
            values = np.where(status == SCORED, own.verdict.scores[:, k], np.nan)
            reason = next((r for (_, n), r in own.verdict.reasons.items() if n == name), "")
            _require_budget(name, model, status, budget, reason)
            _add(found, name, model, values, status, samples)
    pillars = [
        p
        for own in judged.values()
        for a in own.answers
        for p in (*(x[0] for x in a.given), *a.failed)
    ]
    asked = [(), *((p,) for p in dict.fromkeys(pillars))] if pillars else []
    for path in asked:
        for model, own in judged.items():
            values, status = _points(own.answers, path)
            reason = next((r for a in own.answers for r in a.failed.values()), "")
            name = "/".join((FACETS, *path))
            _require_budget(name, model, status, budget, reason)
            _add(found, name, model, values, status, samples)
    return found


def _add(
    found: Columns, name: str, model: str, values: np.ndarray, status: np.ndarray, samples: int
) -> None:
    found.scores.setdefault(name, {})[model] = values.astype(np.float64).reshape(-1, samples)
    found.states.setdefault(name, {})[model] = status.reshape(-1, samples)


def _points(answers: Sequence[Answers], path: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Points [B] of one part, NaN where there are none, and states [B]."""
    values = np.array([points(one).get(path, np.nan) for one in answers])
    status = np.where(np.isnan(values), MISSING, SCORED).astype(np.int8)
    for i, one in enumerate(answers):
        if one.failed and (not path or path[0] in one.failed):
            status[i] = FAILED
    return values, status


def _require_budget(name: str, model: str, status: np.ndarray, budget: float, reason: str) -> None:
    share = float((status == FAILED).mean())
    if share > budget:
        raise EvaluationFailed(
            f"judge {name!r} failed on {share:.0%} of the images of {model!r}, and failures.budget "
            f"allows {budget:.0%}; the first reason: {reason}"
        )


def prompts_told(
    cfg: EvaluateConfig, prompts: Sequence[Prompt], size: tuple[int, int], notes: Sequence[str]
) -> dict[str, Any]:
    """The evaluated prompts as evaluation.json records them."""
    path = packaged(cfg.prompts)
    content = path.read_bytes() if path.is_file() else "".join(p.id for p in prompts).encode()
    sizes = [
        bucket_of(shown_size(p.images[-1]), cfg.buckets) if cfg.buckets and p.images else size
        for p in prompts
    ]
    return {
        "file": cfg.prompts,
        "split": cfg.split,
        "sha256": hashlib.sha256(content).hexdigest(),
        "count": len(prompts),
        "ids": [p.id for p in prompts],
        "categories": dict(sorted(Counter(p.category or "-" for p in prompts).items())),
        "sizes": dict(Counter(f"{h} x {w}" for h, w in sizes)),
        "notes": list(notes),
    }


def results(
    cfg: EvaluateConfig,
    models: Sequence[Contender],
    prompts: Sequence[Prompt],
    judged: Mapping[str, Judged],
    found: Columns,
) -> dict[str, Any]:
    """Tables, comparisons, accuracies and failures, as plain dicts and lists."""
    names = [model.name for model in models]
    tags = [p.category for p in prompts]
    pairs = pairs_of(names, cfg.reference, cfg.compare == "all")
    effects = {j: cfg.effect * (100 if j.partition("/")[0] == FACETS else 1) for j in found.scores}
    comparisons = compared(found.scores, pairs, effects, cfg.alpha, cfg.power)
    told: dict[str, Any] = {
        "models": {model.name: model.described() for model in models},
        "scores": {
            judge: {m: _plain(by_category(s, tags)) for m, s in of_model.items()}
            for judge, of_model in found.scores.items()
        },
        "comparisons": [asdict(one) for one in comparisons],
        "corrections": corrections(cfg, len(comparisons)),
        "geneval": None,
        "ocr": None,
        "facets": {m: [asdict(e) for e in table(own.answers)] for m, own in judged.items()}
        if cfg.facets
        else None,
        "failures": _failures(judged, found),
    }
    if cfg.geneval:
        own = found.scores[cfg.geneval.judge]
        at = cfg.geneval.correct_at
        table_ = {m: _plain(accuracies(s, tags, at)) for m, s in own.items()}
        told["geneval"] = {"judge": cfg.geneval.judge, "correct_at": at, "models": table_}
    if cfg.ocr:
        own = found.scores[cfg.ocr.judge]
        told["ocr"] = {"judge": cfg.ocr.judge, "models": {m: _text(s) for m, s in own.items()}}
    return told


def corrections(cfg: EvaluateConfig, count: int) -> dict[str, Any]:
    """What the p-values were corrected for, in words and numbers."""
    words = (
        f"Unit: the prompt, its samples averaged. Interval: paired bootstrap, 95 %, not corrected. "
        f"Sign test: exact, two-sided. Holm p: corrected for the {count} comparisons here; "
        f"`*`: below {cfg.alpha:g}. d_z: mean / standard deviation of the differences."
    )
    level = cfg.alpha / max(1, count)
    numbers = {"alpha": cfg.alpha, "power": cfg.power, "level": level, "comparisons": count}
    return {"words": words, "method": "Holm 1979", **numbers}


def _plain(of_category: Mapping[str, Any]) -> dict[str, Any]:
    return {category: asdict(one) for category, one in of_category.items()}


def _text(scores_PS: np.ndarray) -> dict[str, Any]:
    """Accuracy: mean over prompts; exact: share of images with the whole text."""
    means = prompt_means(scores_PS)
    means, own = means[~np.isnan(means)], scores_PS[~np.isnan(scores_PS)]
    exact = float((own >= RIGHT).mean()) if len(own) else None
    accuracy = float(means.mean()) if len(means) else None
    return {"accuracy": accuracy, "exact": exact, "images": len(own)}


def _failures(judged: Mapping[str, Judged], found: Columns) -> list[dict[str, Any]]:
    told = []
    for judge, of_model in found.states.items():
        for model, status in of_model.items():
            images = int((status == FAILED).sum())
            if not images:
                continue
            own = judged[model]
            reasons = [r for (_, name), r in own.verdict.reasons.items() if name == judge]
            pillar = judge.partition("/")[2]
            if judge.partition("/")[0] == FACETS:
                reasons = [r for a in own.answers for p, r in a.failed.items() if pillar in ("", p)]
            reason = reasons[0] if reasons else "no reason given"
            told.append({"judge": judge, "model": model, "images": images, "reason": reason})
    return told


def leaks_told(
    found: Mapping[str, Sequence[Leak]],
    checked: Mapping[str, Mapping[str, tuple[int, str]]],
    near: float,
) -> dict[str, Any]:
    """found: leaks by source. checked: model -> source -> (training prompts, why not checked)."""
    counts = {source: Counter(leak.kind for leak in own) for source, own in found.items()}
    told = {
        model: {
            source: {
                "prompts": n,
                "problem": problem,
                "found": dict(counts.get(source, {})),
            }
            for source, (n, problem) in sources.items()
        }
        for model, sources in checked.items()
    }
    rows = [{**asdict(leak), "row": leak.index + 1} for own in found.values() for leak in own]
    for row in rows:
        del row["index"]
    return {"near": near, "checked": told, "found": rows}
