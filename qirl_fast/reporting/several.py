"""compare.html: several runs on one page, on what they have in common (common.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from qirl_fast.reporting.album import Album, embedded
from qirl_fast.reporting.charts import Line, chart, interval
from qirl_fast.reporting.common import (
    Common,
    against_first,
    common,
    differing,
    same_reward,
    scores,
)
from qirl_fast.reporting.curves import constant, smooth, unchanged
from qirl_fast.reporting.markup import FOOT, document, esc, notes, section, table
from qirl_fast.reporting.page import card, duration, hidden, memory
from qirl_fast.reporting.run import Floats, Image_, Run, RunError, column

STRIP = 8  # prompts whose pictures are shown side by side
CURVES = {
    "KL": "approx_kl",
    "clip fraction": "clip_fraction",
    "diversity of a prompt's images (Delta E)": "diversity",
    "gradient norm": "grad_norm",
    "loss": "loss",
}


def compared(runs: Sequence[Run]) -> str:
    """The page of two runs or more. Raises RunError for fewer."""
    if len(runs) < 2:
        raise RunError(f"got {len(runs)} run; wanted two or more: RUN RUN ...")
    both, album = common(runs), Album()
    body = "".join(
        [
            f"<h1>{esc(' / '.join(both.labels))}</h1>{notes(both.remarks)}",
            overview(both),
            section("Settings that differ", settings(both)),
            section("Held-out prompts after training", held_out(both)),
            section("Curves", curves(both)),
            section("The same prompts, after training", strips(both, album)),
        ]
    )
    text, form = embedded(document("compared: " + ", ".join(both.labels), body + FOOT), album)
    return text.replace("\1", f" Pictures: {form}." if album.images else "")


def overview(both: Common) -> str:
    """One row a run: how far it came, how fast, how much memory."""
    rows = []
    for i, (label, run) in enumerate(zip(both.labels, both.runs, strict=True)):
        seconds = sum(row.get("seconds", 0.0) for row in run.timings)
        images = sum(row.get("images_per_s", 0.0) * row.get("seconds", 0.0) for row in run.timings)
        most = ", ".join(f"{name} {mib / 1024:.2f}" for name, mib in memory(run).items())
        rows.append(
            (f'<span class="key c{i % 8}">{esc(label)}</span>', f"{run.done:,} of {run.steps:,}",
             duration(seconds), f"{images / seconds:.1f}" if seconds else "-", esc(most or "-"))
        )  # fmt: skip
    head = ("run", "updates", "time in updates", "images/s", "most memory, GiB")
    return table(head, rows)


def settings(both: Common) -> str:
    """A row for each setting in which they differ."""
    found = differing(both.runs)
    if not found:
        return '<p class="pale">None: the runs have the same settings.</p>'
    rows = [(esc(k), *(esc(hidden(v, k)) for v in values)) for k, values in found.items()]
    return table(("setting", *map(esc, both.labels)), rows, "text")


def held_out(both: Common) -> str:
    """Means on the common prompts, and each run against the first, paired."""
    if not both.prompts[0] or not both.judges:
        return '<p class="pale">Nothing to compare: see above.</p>'
    results = {
        (j, i): against_first(both, j, i) for j in both.judges for i in range(len(both.runs))
    }
    ends = [max(abs(r.low), abs(r.high)) for (_, i), r in results.items() if r is not None and i]
    rows = []
    for judge in both.judges:
        for i, (label, run) in enumerate(zip(both.labels, both.runs, strict=True)):
            r = results[judge, i]
            cells = ["", "", "", ""]
            if i and r is not None:
                kind = "up" if r.low > 0 else "down" if r.high < 0 else ""
                bar = interval(r.low, r.diff, r.high, max(ends))
                span = f"{r.low:+.3f} to {r.high:+.3f}"
                cells = [f'<span class="{kind}">{r.diff:+.3f}</span>', span, bar, f"{r.n}"]
            rows.append(
                (esc(judge) if not i else "", esc(label), *cells, *_means(both, run, i, judge))
            )
    told = (
        f"{len(both.prompts[0])} prompts in common. The difference is to {esc(both.labels[0])}, "
        "both after training, over the prompts both could be judged on; paired bootstrap, 95 %."
    )
    head = ("judge", "run", "difference", "95 % interval", "", "prompts", "before", "after")
    return f'{table(head, rows)}<p class="pale">{told}</p>'


def _means(both: Common, run: Run, i: int, judge: str) -> tuple[str, str]:
    """Before and after on the common prompts; a dash where there is none."""
    found = []
    for held in (run.before, run.after):
        same = held is not None and run.after is not None and held.ids == run.after.ids
        values = scores(run, held, both.prompts[i], judge) if held and same else np.empty(0)
        known = values[np.isfinite(values)]
        found.append(f"{known.mean():.3f}" if len(known) else "-")
    return found[0], found[1]


def seconds(run: Run) -> Floats:
    """Seconds from the beginning of the first update to the end of each [U], NaN if not known."""
    steps = [row["step"] for row in run.timings]
    sums = np.cumsum(np.nan_to_num(column(run.timings, "seconds"))).tolist()
    ends = dict(zip(steps, sums, strict=True))
    return np.array([ends.get(row["step"], np.nan) for row in run.metrics], np.float64)


def curves(both: Common) -> str:
    """Rewards over updates and over seconds, what the update did, and the clock."""
    judges = [(name, f"reward/{name}") for name in both.judges]
    if same_reward(both.runs) and len(both.runs[0].weights) > 1:
        judges.insert(0, ("reward", "reward"))
    update: Callable[[Run], Floats] = lambda run: run.column("step")  # noqa: E731
    groups = {
        "Judges, by update": [_over(both, t, n, update, "update") for t, n in judges],
        "Judges, by seconds in updates": [_over(both, t, n, seconds, "seconds") for t, n in judges],
        "Policy": _policy(both),
        "Clock and memory": [_clock(both, "images/s"), _clock(both, "memory, GiB")],
    }
    return "".join(
        f'<h3>{title}</h3><div class="charts">{"".join(charts)}</div>\n'
        for title, charts in groups.items()
        if any(charts)
    )


def _policy(both: Common) -> list[str]:
    """What the updates did; what never changed, and is the same in all runs, without a chart."""
    found, still = [], []
    for title, name in CURVES.items():
        every = np.concatenate([run.column(name) for run in both.runs])
        if np.isfinite(every).sum() > len(both.runs) and constant(every):
            still.append(f"{title}: {every[np.isfinite(every)][0]:g}")
        else:
            found.append(_over(both, title, name, lambda run: run.column("step"), "update"))
    return found + unchanged(still)


def _over(both: Common, title: str, name: str, x: Callable[[Run], Floats], x_label: str) -> str:
    """A metric of all runs over each other: pale as it was, and its running mean."""
    lines = []
    for i, (label, run) in enumerate(zip(both.labels, both.runs, strict=True)):
        y, place = run.column(name), x(run)
        known = np.isfinite(place)
        lines.append(Line(label, place[known], y[known], i, "pale"))
        lines.append(Line(label, place[known], smooth(y)[known], i))
    return chart(title, lines, x_label)


def _clock(both: Common, title: str) -> str:
    lines = []
    for i, (label, run) in enumerate(zip(both.labels, both.runs, strict=True)):
        x = column(run.timings, "step")
        if title == "images/s":
            lines.append(Line(label, x, smooth(column(run.timings, "images_per_s")), i))
        else:
            held = [row.get("memory_mib") or {} for row in run.timings]
            kind = "gpu" if any("gpu" in row for row in held) else "process"
            lines.append(Line(label, x, column(held, kind) / 1024, i))
    return chart(title, lines)


def strips(both: Common, album: Album) -> str:
    """Pictures of the first common prompts by every run, beside the first run's before."""
    first, numbers = both.runs[0], both.prompts[0]
    if not numbers or first.after is None:
        return ""
    which = numbers[:STRIP]
    columns: dict[str, Sequence[Image_ | None]] = {}
    rewards: dict[str, Floats] = {}
    if first.before is not None and first.before.ids == first.after.ids:
        columns["source"] = first.before.images(which, "source")
        columns[f"before, {both.labels[0]}"] = first.before.images(which)
        rewards[f"before, {both.labels[0]}"] = first.reward(first.before)[which]
    for label, run, own in zip(both.labels, both.runs, both.prompts, strict=True):
        if run.after is not None:
            columns[label] = run.after.images(own[:STRIP])
            rewards[label] = run.reward(run.after)[own[:STRIP]]
    if not same_reward(both.runs):
        rewards = {}
    texts = [first.after.texts[i] for i in which]
    told = f"{len(which)} of {len(numbers)} common prompts."
    cards = [card(texts[i], i, columns, rewards, album) for i in range(len(which))]
    return f'<p class="pale">{told}</p><div class="rows">{"".join(cards)}</div>'
