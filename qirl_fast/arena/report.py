"""The results in words: one list of parts, as HTML for the page and as text for a terminal."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from qirl_fast.arena.results import ALL, Judged, Verdict, agreement, judged, ratings, verdict
from qirl_fast.arena.store import Store
from qirl_fast.arena.study import Study
from qirl_fast.config.arena import ArenaConfig
from qirl_fast.evaluation.bradley_terry import ANCHOR, FEWEST, Ratings
from qirl_fast.evaluation.krippendorff import Alpha
from qirl_fast.evaluation.win_share import Share


@dataclass(frozen=True)
class Part:
    """A heading, sentences, and a table with its header as the first row."""

    title: str
    sentences: Sequence[str]
    table: Sequence[Sequence[str]] = ()
    kind: str = ""


def report(cfg: ArenaConfig, study: Study, store: Store, model: str, other: str) -> list[Part]:
    """Everything that is known of `model` against `other`."""
    people, judges = store.votes("person"), store.votes("model")
    of_judges = judged(people, judges, model, other, cfg.level, cfg.resamples)
    found = verdict(study, people, model, other, cfg.votes_per_prompt, cfg.level)
    rated = ratings(study, people, cfg.level, cfg.resamples)
    return [
        _verdict(found, cfg, len(study.prompts), len(study.models)),
        _ratings(study, rated, cfg.level),
        _people(agreement(people, cfg.level, cfg.resamples), len(people), store.changes()),
        _judges(of_judges, model, other),
        *([Part("Left out", study.notes)] if study.notes else []),
    ]


def verdict_line(found: Verdict, level: float) -> str:
    """The one sentence that says whether a gain is shown."""
    share = found.share
    if not share.n:
        return (
            f"No prompt of {found.model} against {found.other} is decided yet: the interval is 0 "
            'to 100 % and does not exclude "no difference".'
        )
    says = "excludes" if share.excludes_no_difference else "does not exclude"
    return (
        f"{found.model} is preferred to {found.other} on {percent(share.value)} of {share.n} "
        f"prompts, {100 * level:.4g} % interval {_span(share)}. The interval {says} "
        '"no difference" (50 %).'
    )


def _verdict(found: Verdict, cfg: ArenaConfig, prompts: int, models: int) -> Part:
    for_model, for_other, ties, bad = found.counts
    raters = some(found.raters, "person", "people")
    votes = some(cfg.votes_per_prompt, "vote", "votes")
    lines = [
        verdict_line(found, cfg.level),
        f"Votes of {raters}: {for_model} for {found.model}, {for_other} for {found.other}, {ties} "
        f"tied, {bad} both bad; a tie or both bad is half a win for each.",
        f"A prompt is decided by its first {votes}: {found.share.n} of {prompts} are, "
        f"{found.waiting} wait for more.",
        "The interval holds at every moment at once (a confidence sequence): you may look after "
        "every vote and stop when it excludes 50 %, and are wrong in at most "
        f"{100 * (1 - cfg.level):.3g} % of studies.",
    ]
    if models > 2:
        pairs = models * (models - 1) // 2
        says = "excludes" if found.strict.excludes_no_difference else "does not exclude"
        lines.append(
            f"This is one of {pairs} pairs. Unless it was named before the first vote, read the "
            f"interval that holds for all of them together: {_span(found.strict)}, which {says} "
            "50 %."
        )
    if found.looked:
        lines.append(
            f"{found.looked} of these votes are of people who had seen results before they voted."
        )
    kind = "shown" if found.share.excludes_no_difference else "open"
    return Part(f"{found.model} against {found.other}", lines, kind=kind)


def _ratings(study: Study, found: dict[str, Ratings], level: float) -> Part:
    first = study.models[0]
    table = [["category", "prompts", *(m for m in study.models if m != first)]]
    for name, of in found.items():
        cells = [
            f"{of.elo[m]:.0f}" + (_range(of.low[m], of.high[m]))
            for m in range(1, len(study.models))
        ]
        table.append([name if name == ALL else name or "none", str(of.prompts), *cells])
    text = (
        f"Bradley-Terry strengths on Elo's scale; {first} stands at {ANCHOR:.0f} and the interval "
        f"({100 * level:.4g} %, bootstrap over prompts) is that of the distance to it. These "
        "intervals are for one look at the planned end, not for stopping early; categories were "
        f"not corrected for how many they are, and fewer than {FEWEST} prompts have no interval."
    )
    return Part("Elo by category", [text] if found else ["There are no votes yet."], table)


def _people(found: Alpha, votes: int, changes: int) -> Part:
    text = f"Krippendorff's alpha (nominal: which model, tie, both bad): {_alpha(found)}."
    counted = f"{some(votes, 'vote', 'votes')} in all, {some(changes, 'change', 'changes')} of one."
    return Part("Agreement of people", [text, counted])


def _judges(found: Sequence[Judged], model: str, other: str) -> Part:
    table = [["judge", f"prefers {model} to {other}", "agrees with people", "alpha with people"]]
    for one in found:
        agrees = f"{one.same} of {one.n}" if one.n else "nothing to compare"
        cells = [one.judge, f"{percent(one.share.value)} ({_span(one.share)}), n {one.share.n}"]
        table.append([*cells, agrees, _alpha(one.alpha)])
    text = (
        "Judges are models. Their votes are in none of the numbers above. They agree where judge "
        "and the majority of people both prefer a model, and it is the same."
    )
    none = "No judge has voted. python -m qirl_fast.arena judge SETTINGS lets one vote."
    return Part("Judges, kept apart", [text if found else none], table if found else ())


def some(n: int, one: str, many: str) -> str:
    """The number with its noun."""
    return f"{n} {one if n == 1 else many}"


def percent(value: float) -> str:
    """As people read it."""
    return f"{100 * value:.1f} %"


def _span(share: Share) -> str:
    return f"{100 * share.low:.1f} to {100 * share.high:.1f} %"


def _range(low: float, high: float) -> str:
    return "" if math.isnan(low) else f" ({low:.0f} to {high:.0f})"


def _alpha(found: Alpha) -> str:
    if math.isnan(found.value):
        return f"none ({found.reason})"
    bounds = "" if math.isnan(found.low) else f" ({found.low:.2f} to {found.high:.2f})"
    why = f"; no interval: {found.reason}" if found.reason else ""
    return f"{found.value:.2f}{bounds}, {found.units} pairs with two votes or more{why}"


def as_text(parts: Sequence[Part]) -> str:
    """For a terminal."""
    lines: list[str] = []
    for part in parts:
        lines += [part.title, "=" * len(part.title), *part.sentences]
        if len(part.table) > 1:
            widths = [max(map(len, column)) for column in zip(*part.table, strict=True)]
            lines += [
                "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
                for row in part.table
            ]
        lines.append("")
    return "\n".join(lines)


def as_html(parts: Sequence[Part]) -> str:
    """For the page; every text is escaped."""
    out = []
    for part in parts:
        out.append(f"<section class='part {part.kind}'><h3>{html.escape(part.title)}</h3>")
        out += [f"<p>{html.escape(text)}</p>" for text in part.sentences]
        if len(part.table) > 1:
            head, *rows = part.table
            cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
            out.append(f"<div class='wide'><table><tr>{cells}</tr>")
            for row in rows:
                cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
                out.append(f"<tr>{cells}</tr>")
            out.append("</table></div>")
        out.append("</section>")
    return f"<div id='arena-results'>{''.join(out)}</div>"
