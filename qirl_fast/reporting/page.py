"""report.html: one run on one page, which opens offline and stays under `album.LIMIT` bytes.

Parts: what it was and what came of it; warnings (checks.py); held-out scores with intervals;
curves; the same prompts through training; the best, worst and most changed of the held-out prompts;
all settings. A part without data says so or is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from qirl_fast.reporting.album import Album, embedded
from qirl_fast.reporting.charts import interval
from qirl_fast.reporting.checks import changes, checks
from qirl_fast.reporting.curves import curves
from qirl_fast.reporting.markup import (
    FOOT,
    document,
    esc,
    notes,
    picture,
    section,
    short,
    table,
    tiles,
)
from qirl_fast.reporting.run import Floats, Held, Image_, Run, read_run
from qirl_fast.whole import write_text

NAME = "report.html"
STRIP_COLUMNS = 10  # pictures of a prompt through training, before and after among them
EACH = 4  # best, worst, most changed prompts
LONGEST_SETTINGS = 200_000  # characters
SECRET = re.compile(r"token|secret|password|api_?key|authorization", re.IGNORECASE)


def write_page(folder: Path) -> Path:
    """Write report.html into a run's folder, whole or not at all, and return its path.

    Raises RunError where the folder is no run's.
    """
    path = folder / NAME
    write_text(path, page(read_run(folder)))
    return path


def page(run: Run) -> str:
    """The HTML of a run's report."""
    album = Album()
    body = "".join(
        [
            heading(run),
            section("Warnings", warnings(run)),
            section("Held-out prompts, before and after", held_out(run)),
            section("Curves", curves(run)),
            section("The same prompts through training", strips(run, album)),
            section("Best, worst and most changed", extremes(run, album)),
            section("Settings", settings(run)),
        ]
    )
    text, form = embedded(document(run.name, body + FOOT), album)
    return text.replace("\1", f" Pictures: {form}." if album.images else "")


def heading(run: Run) -> str:
    """What ran, how far it came, and the few numbers that matter."""
    algorithm = (run.settings.get("algorithm") or {}).get("name", "")
    model = (run.settings.get("model") or {}).get("path", "")
    told = ", ".join(f"{name} {value}" for name, value in (
        ("algorithm", algorithm), ("model", model), ("seed", run.settings.get("seed")),
    ) if value not in ("", None))  # fmt: skip
    values = [("updates", f"{run.done:,} of {run.steps:,}")]
    values += [
        (f"{name}, held out", f"{r['before']:.3f} &rarr; {r['after']:.3f}")
        for name, r in list(changes(run).items())[:4]
    ]
    seconds = sum(row.get("seconds", 0.0) for row in run.timings)
    images = sum(row.get("images_per_s", 0.0) * row.get("seconds", 0.0) for row in run.timings)
    if seconds:
        values += [("time in updates", duration(seconds)), ("images/s", f"{images / seconds:.1f}")]
    for name, most in memory(run).items():
        values.append((f"most memory, {name}", f"{most / 1024:.2f} GiB"))
    return (
        f"<h1>{esc(run.name)}</h1><p class='pale'>{esc(told)}</p>{notes(run.notes)}{tiles(values)}"
    )


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as many as are needed."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.1f} s"


def memory(run: Run) -> dict[str, float]:
    """The most MiB that any update had, by kind."""
    found: dict[str, float] = {}
    for row in run.timings:
        for name, value in (row.get("memory_mib") or {}).items():
            found[name] = max(found.get(name, 0.0), value)
    return found


def warnings(run: Run) -> str:
    """Warnings in full; what is clear or was not checked below them."""
    found = checks(run)
    fired = [c for c in found if c.state == "warning"]
    rest = [c for c in found if c.state != "warning"]
    shown = "".join(f'<p class="warning"><b>{esc(c.name)}</b>: {esc(c.text)}</p>\n' for c in fired)
    clear = sum(c.state == "clear" for c in rest)
    head = f"{len(fired) or 'No'} warning{'s' * (len(fired) != 1)}; {clear} checks clear"
    if len(rest) > clear:
        head += f", {len(rest) - clear} not made"
    lines = [(esc(c.name), esc(c.state), esc(c.text)) for c in rest]
    told = table(("check", "result", "what was found"), lines, "text")
    return f"{shown}<details><summary>{head}</summary>{told}</details>"


def held_out(run: Run) -> str:
    """Each judge's scores with the paired interval of the change."""
    found = changes(run)
    if not found:
        return before_only(run)
    reach = max((max(abs(r["low"]), abs(r["high"])) for r in found.values()), default=0.0)
    rows = [
        (f"{esc(n)}<br><small>{esc(role(run, n))}</small>", *changed(r, reach))
        for n, r in found.items()
    ]
    head = ("judge", "change", "95 % interval", "", "before", "after", "prompts")
    how = run.settings.get("evaluation") or {}
    told = (
        f"{how.get('samples_per_prompt', 1)} image(s) a prompt, {how.get('steps')} steps, guidance "
        f"{how.get('guidance')}, fixed seeds; paired bootstrap over prompts."
    )
    return f'{table(head, rows)}<p class="pale">{esc(told)}</p>'


def changed(r: dict[str, float], reach: float) -> tuple[str, ...]:
    """Cells of a judge's row, after its name."""
    kind = "up" if r["low"] > 0 else "down" if r["high"] < 0 else ""
    bar = interval(r["low"], r["diff"], r["high"], reach)
    return (
        f'<span class="{kind}">{r["diff"]:+.3f}</span>', f"{r['low']:+.3f} to {r['high']:+.3f}",
        bar, f"{r['before']:.3f}", f"{r['after']:.3f}", f"{int(r['n'])}",
    )  # fmt: skip


def role(run: Run, judge: str) -> str:
    """Whether a judge is optimised, and how much it weighs."""
    weight = run.weights.get(judge)
    return "watched" if weight is None else f"weight {weight:.2g}"


def before_only(run: Run) -> str:
    """Scores before training, of a run without any after."""
    if run.before is None:
        return '<p class="pale">There was no held-out evaluation yet.</p>'
    rows = []
    for name, scores in run.before.scores.items():
        known = scores[np.isfinite(scores)]
        if len(known):
            rows.append((esc(name), esc(role(run, name)), f"{known.mean():.3f}", f"{len(known)}"))
    told = '<p class="pale">There is no evaluation after training yet.</p>'
    return table(("judge", "", "before", "prompts"), rows) + told


def strips(run: Run, album: Album) -> str:
    """The first prompts before, after some updates, and after all, from the same noise."""
    if run.before is None:
        return ""
    count = max([len(images) for images in run.strips.values()], default=8)
    which = range(min(count, len(run.before.ids)))
    columns: dict[str, Sequence[Image_ | None]] = {}
    sources = run.before.images(which, "source")
    if any(image is not None for image in sources):
        columns["source"] = sources
    columns["before"] = run.before.images(which)
    updates = list(run.strips)
    room = STRIP_COLUMNS - 2
    picked = [updates[i] for i in evenly(len(updates), room)]
    columns |= {f"update {n}": run.strips[n] for n in picked}
    if run.after is not None:
        columns["after"] = run.after.images(which)
    told = f"{len(which)} of {len(run.before.ids)} held-out prompts, the first of the file."
    if len(picked) < len(updates):
        told += f" {len(picked)} of {len(updates)} drawings on the way."
    if not run.strips:
        told += " Nothing was drawn on the way (tracking.strips)."
    scores = {"before": run.reward(run.before)}
    if run.after is not None:
        scores["after"] = run.reward(run.after)
    cards = [card(run.before.texts[i], i, columns, scores, album) for i in which]
    return f'<p class="pale">{told}</p><div class="rows">{"".join(cards)}</div>'


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of range(count), evenly spread, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))}) if count else []


def card(
    text: str | None,
    i: int,
    columns: dict[str, Sequence[Image_ | None]],
    scores: dict[str, Floats],
    album: Album,
) -> str:
    """One prompt: its text over its pictures, number i of each column, with their rewards."""
    figures = []
    for name, images in columns.items():
        image = images[i] if i < len(images) else None
        if image is None:
            continue
        caption = f"<div>{esc(name)}"
        if name in scores and np.isfinite(scores[name][i]):
            caption += f"<br>{scores[name][i]:.3f}"
        figures.append(picture(album.mark(image), image.shape[1], caption + "</div>"))
    return (
        f'<div class="card"><p>{short(text)}</p><div class="strip">{"".join(figures)}</div></div>\n'
    )


def extremes(run: Run, album: Album) -> str:
    """Held-out prompts of the highest and the lowest reward after, and of the largest change."""
    if run.before is None or run.after is None or run.before.ids != run.after.ids:
        return ""
    before, after = run.reward(run.before), run.reward(run.after)
    known = np.flatnonzero(np.isfinite(before) & np.isfinite(after))
    if not len(known):
        return ""
    order = known[np.argsort(-after[known], kind="stable")]
    moved = known[np.argsort(-np.abs(after - before)[known], kind="stable")]
    groups = {"Best after": order[:EACH], "Worst after": order[::-1][:EACH], "Most changed": moved}
    found = []
    for title, numbers in groups.items():
        cards = [_card_of(run, run.before, run.after, int(i), album) for i in numbers[:EACH]]
        found.append(f'<h3>{title}</h3><div class="cards">{"".join(cards)}</div>')
    told = (
        f"By the reward (the judges' weighted mean), {min(EACH, len(known))} of {len(known)} "
        "prompts each; a prompt may stand in two places."
    )
    return f'<p class="pale">{told}</p>{"".join(found)}'


def _card_of(run: Run, before: Held, after: Held, i: int, album: Album) -> str:
    columns: dict[str, Sequence[Image_ | None]] = {
        "source": before.images([i], "source"),
        "before": before.images([i]),
        "after": after.images([i]),
    }
    scores = {"before": run.reward(before)[[i]], "after": run.reward(after)[[i]]}
    text = after.texts[i] if before.texts[i] is None else before.texts[i]
    return card(text, 0, columns, scores, album)


def settings(run: Run) -> str:
    """All settings as YAML, versions, and where the time went, folded up."""
    text = OmegaConf.to_yaml(OmegaConf.create(hidden(run.settings)))
    if len(text) > LONGEST_SETTINGS:
        left = len(text) - LONGEST_SETTINGS
        text = f"{text[:LONGEST_SETTINGS]}\n... {left:,} more characters: see config.resolved.yaml"
    found = f"<details><summary>config.resolved.yaml</summary><pre>{esc(text)}</pre></details>"
    rows = [(esc(n), esc(v)) for n, v in (run.summary.get("versions") or {}).items()]
    if commit := run.summary.get("commit"):
        rows.append(("commit", esc(commit)))
    if rows:
        told = table(("", "version"), rows, "text")
        found += f"<details><summary>versions</summary>{told}</details>"
    return found


def hidden(value: Any, name: str = "") -> Any:
    """Settings with the values of secret-looking names left out: a page is passed on."""
    if isinstance(value, dict):
        return {key: hidden(child, str(key)) for key, child in value.items()}
    if isinstance(value, list):
        return [hidden(child, name) for child in value]
    return "(not shown)" if isinstance(value, str) and SECRET.search(name) else value
