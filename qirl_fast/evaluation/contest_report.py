"""An evaluation in words and rows: Markdown of what evaluation.json holds, and the CSV.

Whatever came from outside, a prompt or a model's name, is text in a cell: pipes, line breaks and
HTML in it are written so that they show and do nothing.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qirl_fast.data.prompts import Prompt
from qirl_fast.evaluation.contest import ALL
from qirl_fast.rewards.judge import FAILED, SCORED

SHOWN = 10  # leaks of a source and kind that are listed
LONGEST = 100  # characters of a prompt in a table
STATES = {SCORED: "scored", FAILED: "failed"}
COLUMNS = ("model", "row", "id", "category", "prompt", "sample", "judge", "state", "score")
HTML = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", "`": "\\`", "*": "\\*", "_": "\\_"}
    | {"[": "\\[", "]": "\\]", "\\": "\\\\"}
)
TEXTS = ("prompt", "trained", "source")
MEANING = {
    "row": "the same row",
    "text": "the same text",
    "image": "the same image",
    "near": "nearly the same text",
}


def cell(text: Any) -> str:
    """Text that shows in a Markdown table as it is, on one line."""
    plain = " ".join(str(text).split())
    short = plain if len(plain) <= LONGEST else plain[: LONGEST - 3] + "..."
    return short.translate(HTML)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table; cells are escaped."""
    lines = [columns, *rows]
    head, *body = ["| " + " | ".join(cell(x) for x in line) + " |" for line in lines]
    return [head, "|---" * len(columns) + "|", *body, ""]


def number(value: float | None, form: str = ".3f") -> str:
    """The number, or "-" where there is none."""
    return "-" if value is None else format(value, form)


def p_value(p: float) -> str:
    """Three digits, or that it is smaller."""
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def markdown(found: Mapping[str, Any]) -> str:
    """evaluation.md of the content of evaluation.json."""
    lines = ["# Evaluation", ""]
    lines += _what(found)
    lines += _leaks(found["leaks"])
    for title, columns, rows, note in tables(found):
        lines += [f"## {title}", "", *([note, ""] if note else []), *table(columns, rows)]
    lines += _plans(found)
    lines += _failures(found["failures"])
    return "\n".join(lines).rstrip() + "\n"


def _what(found: Mapping[str, Any]) -> list[str]:
    prompts, seeds = found["prompts"], found["seeds"]
    sizes = ", ".join(f"{n} at {size}" for size, n in prompts["sizes"].items())
    lines = [
        f"- Prompts: {prompts['count']} of {cell(prompts['file'])}, split "
        f"{cell(prompts['split'])}, SHA-256 of the file {prompts['sha256'][:16]}; drawn "
        f"(height x width): {sizes}.",
        f"- Images: {seeds['samples_per_prompt']} a prompt, seed {seeds['seed']}, ODE steps; every "
        "model starts from the same noise.",
        *(f"- {cell(note)}" for note in prompts["notes"]),
        "",
    ]
    rows = [
        [
            name,
            own["base"],
            own["adapter"] or "-",
            own["guidance"],
            own["steps"],
            own["weights"][:12],
        ]
        for name, own in found["models"].items()
    ]
    return lines + table(["model", "base", "adapter", "guidance", "steps", "weights"], rows)


def leak_lines(leaks: Mapping[str, Any]) -> list[str]:
    """What the leak check found, a line a source; plain text."""
    lines = []
    for model, sources in leaks["checked"].items():
        if not sources:
            lines.append(f"{model}: what it was trained on is not known, so nothing is checked")
        for source, own in sources.items():
            if own["problem"]:
                lines.append(f"{model}: not checked against {source}: {own['problem']}")
                continue
            kinds = [f"{n} {MEANING[kind]}" for kind, n in own["found"].items() if n]
            said = ", ".join(kinds) or "none is among them"
            lines.append(f"{model}: against {own['prompts']} training prompts of {source}: {said}")
    return lines


def _leaks(leaks: Mapping[str, Any]) -> list[str]:
    lines = ["## Leaks", ""]
    lines += [
        f"Exact: equal rows, texts (case and space folded), image files. Nearly: "
        f"{leaks['near']:g} or more of the words in common, in any order.",
        "",
        *(f"- {cell_line(line)}" for line in leak_lines(leaks)),
        "",
    ]
    rows = [
        [one["row"], MEANING[one["kind"]], number(one["likeness"], ".2f"), *(one[k] for k in TEXTS)]
        for one in _some(leaks["found"])
    ]
    if rows:
        lines += table(["row", "what", "likeness", "prompt", "training prompt", "source"], rows)
        more = len(leaks["found"]) - len(rows)
        lines += [f"and {more} more, in evaluation.json", ""] if more > 0 else []
    return lines


def cell_line(text: str) -> str:
    """A line of plain text in Markdown, whole."""
    return " ".join(text.split()).translate(HTML)


def _some(found: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """SHOWN leaks of each source and kind."""
    seen: dict[tuple[str, str], int] = {}
    for one in found:
        key = (one["source"], one["kind"])
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= SHOWN:
            yield one


Table = tuple[str, list[str], list[list[str]], str]


def tables(found: Mapping[str, Any]) -> Iterator[Table]:
    """(title, columns, rows, note) of every table, as text."""
    models = list(found["models"])
    binary = found["geneval"] and found["geneval"]["judge"]
    for judge, of_model in found["scores"].items():
        if judge == binary and judge not in found["settings"]["score"]:
            continue  # it has a table of its own
        categories = list(of_model[models[0]])
        rows = [
            [category, str(max(of_model[m][category]["prompts"] for m in models))]
            + [number(of_model[m][category]["value"]) for m in models]
            for category in categories
        ]
        yield f"{judge} by category", ["category", "prompts", *models], rows, ""
    yield from _comparisons(found)
    yield from _accuracies(found, models)
    if found["facets"]:
        yield _facets(found["facets"], models)


def _comparisons(found: Mapping[str, Any]) -> Iterator[Table]:
    if not found["comparisons"]:
        return
    columns = ["judge", "model", "above", "difference (95 %)", "better/worse/same", "sign test p"]
    columns += ["Holm p", "d_z", "rank-biserial", "prompts"]
    rows = []
    for one in found["comparisons"]:
        gain, signs = one["gain"], one["signs"]
        interval = f"{gain['value']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
        mark = " *" if one["adjusted"] < found["corrections"]["alpha"] else ""
        row = [one["judge"], one["model"], one["other"], interval]
        row += [f"{signs['better']}/{signs['worse']}/{signs['same']}", p_value(signs["p"])]
        row += [p_value(one["adjusted"]) + mark, number(one["dz"], "+.2f")]
        rows.append([*row, number(one["rank_biserial"], "+.2f"), str(one["prompts"])])
    yield "Comparisons", columns, rows, found["corrections"]["words"]


def _accuracies(found: Mapping[str, Any], models: Sequence[str]) -> Iterator[Table]:
    if found["geneval"]:
        of_model, judge = found["geneval"]["models"], found["geneval"]["judge"]
        rows = [
            [tag, str(max(of_model[m][tag]["images"] for m in models))]
            + [number(of_model[m][tag]["right"]) for m in models]
            for tag in of_model[models[0]]
        ]
        note = f"Share of images on which {cell(judge)} finds all that was asked for; `{ALL}`: "
        note += "the unweighted mean of the tags (GenEval, arXiv 2310.11513)."
        yield "GenEval-style accuracy", ["tag", "images", *models], rows, note
    if found["ocr"]:
        rows = [
            [m, str(own["images"]), number(own["accuracy"]), number(own["exact"])]
            for m, own in found["ocr"]["models"].items()
        ]
        note = "Accuracy: mean of 1 - edit distance / length; exact: share of images with all text."
        yield "OCR accuracy", ["model", "images", "accuracy", "exact"], rows, note


def _facets(of_model: Mapping[str, Any], models: Sequence[str]) -> Table:
    paths = list(dict.fromkeys(tuple(e["path"]) for m in models for e in of_model[m]))
    rows = []
    for path in sorted(
        paths, key=lambda path: [paths.index(path[:d]) for d in range(1, len(path) + 1)]
    ):
        own = {m: next((e for e in of_model[m] if tuple(e["path"]) == path), None) for m in models}
        name = "overall" if not path else "\u00b7 " * (len(path) - 1) + path[-1]
        cells = []
        for entry in own.values():
            failed = f", {entry['failed']} failed" if entry and entry["failed"] else ""
            cells.append(
                f"{number(entry['points'], '.1f')} ({entry['images']}{failed})" if entry else "-"
            )
        rows.append([name, *cells])
    note = (
        "0 | 1 | 2 are 0 | 60 | 100 points, N/A is left out; facets make groups, groups pillars, "
    )
    note += "pillars the overall, image by image (arXiv 2605.28091). In brackets: images."
    return "Facets", ["pillar, group, facet", *models], rows, note


def plan_lines(found: Mapping[str, Any]) -> list[str]:
    """The planner's sentence of each comparison; plain text."""
    own, images = found["corrections"], found["seeds"]["samples_per_prompt"]
    lines = []
    for one in found["comparisons"]:
        pair = f"{one['judge']}, {one['model']} against {one['other']}"
        if one["visible"] is None:
            lines.append(f"{pair}: all differences are alike, so there is nothing to plan from")
            continue
        needed = "more than ten million" if one["needed"] is None else str(one["needed"])
        lines.append(
            f"{pair}: the differences have a standard deviation of {one['sd']:.3f}; to see "
            f"+{one['effect']:g} you need {needed} prompts of {images} "
            f"image{'s' if images > 1 else ''} each (power {own['power']:g}, level "
            f"{own['level']:.3g}); these {one['prompts']} show +{one['visible']:.3f}"
        )
    return lines


def _plans(found: Mapping[str, Any]) -> list[str]:
    lines = plan_lines(found)
    return ["## How many prompts", "", *(f"- {cell_line(x)}" for x in lines), ""] if lines else []


def _failures(failures: Sequence[Mapping[str, Any]]) -> list[str]:
    if not failures:
        return []
    rows = [[f["judge"], f["model"], str(f["images"]), f["reason"]] for f in failures]
    note = "Failed images enter no mean; none counts as 0."
    return ["## Failures", "", note, "", *table(["judge", "model", "images", "first reason"], rows)]


def csv_text(
    prompts: Sequence[Prompt],
    scores: Mapping[str, Mapping[str, np.ndarray]],
    states: Mapping[str, Mapping[str, np.ndarray]],
) -> str:
    """evaluation.csv: a line a model, prompt, sample and judge, in that order.

    scores: judge -> model -> float64 [P, S]; states: int8 [P, S], of which others than scored have
    no score. row: counted from 1, in the file.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    judges = list(scores)
    for model in scores[judges[0]] if judges else ():
        for p, prompt in enumerate(prompts):
            head = [model, p + 1, prompt.id, prompt.category or "", prompt.prompt]
            for s in range(scores[judges[0]][model].shape[1]):
                for judge in judges:
                    state = STATES.get(int(states[judge][model][p, s]), "missing")
                    value = repr(float(scores[judge][model][p, s])) if state == "scored" else ""
                    writer.writerow([*head, s, judge, state, value])
    return out.getvalue()
