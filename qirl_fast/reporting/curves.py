"""Curves of a run: judges with their in-group spread, the policy, the clock, memory, the rest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qirl_fast.evaluation.curves import SMOOTH, running_mean
from qirl_fast.reporting.charts import Line, chart, stack
from qirl_fast.reporting.markup import esc
from qirl_fast.reporting.run import Floats, Run, column

# Metrics that have a chart of their own, by its title; each chart holds what there is of them.
POLICY = {
    "KL": ("approx_kl", "kl", "velocity_kl"),
    "ratio: largest distance from 1": ("ratio_error",),
    "clip fraction": ("clip_fraction",),
    "before the update: distance of the ratio from 1": ("pre_update_ratio_error",),
    "before the update: clip fraction": ("pre_update_clip_fraction",),
    "diversity of a prompt's images (Delta E)": ("diversity",),
    "loss": ("loss",),
    "gradient norm": ("grad_norm",),
    "learning rate": ("lr",),
    "groups that train, rows left out": ("kept_groups", "skipped_share"),
}
JUDGES = ("reward/", "std/", "flat/", "failed/", "missing/", "heldout/")


def smooth(values: Floats) -> Floats:
    """The running mean of a long series, the series itself where it is short."""
    return running_mean(values, max(1, min(SMOOTH, len(values) // 10)))


def curves(run: Run) -> str:
    """All charts, in groups."""
    if not run.metrics:
        return '<p class="pale">No update was finished yet.</p>'
    groups = {
        "Judges": [judge(run, name, i) for i, name in enumerate(run.judges)] + verdicts(run),
        "Policy": policy(run),
        "Clock and memory": clock(run),
        "Other": other(run),
    }
    if len(run.weights) > 1:
        x, y = run.column("step"), run.column("reward")
        lines = [Line("reward", x, y, 7, "pale"), Line("reward", x, smooth(y), 7)]
        groups["Judges"].insert(0, chart("reward", lines, note="weighted mean of rollouts"))
    return "".join(
        f'<h3>{title}</h3><div class="charts">{"".join(charts)}</div>\n'
        for title, charts in groups.items()
        if any(charts)
    )


def judge(run: Run, name: str, color: int) -> str:
    """Mean over each update's rollout, its running mean, the in-group spread, held-out means."""
    x, mean = run.column("step"), run.column(f"reward/{name}")
    lines = [
        Line("rollout", x, mean, color, "pale"),
        Line("rollout, running mean", x, smooth(mean), color, spread=run.column(f"std/{name}")),
    ]
    held = run.column(f"heldout/{name}")
    for evaluation, at in ((run.before, 0), (run.after, run.after.update if run.after else 0)):
        if evaluation is not None and name in evaluation.scores:
            scores = evaluation.scores[name]
            if np.isfinite(scores).any():
                x, mean = np.append(x, at), np.append(mean, np.nan)
                held = np.append(held, np.nanmean(scores))
    order = np.argsort(x, kind="stable")
    lines.append(Line("held out", x[order], held[order], 7, "dots"))
    weight = run.weights.get(name)
    told = "watched" if weight is None else f"optimised, weight {weight:.2g}"
    return chart(name, lines, note=f"{told}; band: in-group standard deviation")


def verdicts(run: Run) -> list[str]:
    """Shares of images that judges failed on, or had nothing to judge in, and of flat groups."""
    found = []
    for what, title in (
        ("failed", "share of images a judge failed on"),
        ("missing", "share of images with nothing to judge"),
        ("flat", "share of groups without spread"),
    ):
        x = run.column("step")
        lines = [Line(n, x, smooth(run.column(f"{what}/{n}")), i) for i, n in enumerate(run.judges)]
        if any(np.nanmax(line.y, initial=0.0) > 0 for line in lines if np.isfinite(line.y).any()):
            found.append(chart(title, lines))
    return found


def policy(run: Run) -> list[str]:
    """What the update did; what never changed stands in a list, without a chart."""
    x, found, still = run.column("step"), [], []
    for title, names in POLICY.items():
        there = {name: run.column(name) for name in names}
        there = {name: y for name, y in there.items() if np.isfinite(y).any()}
        if there and all(constant(y) for y in there.values()) and run.done > 1:
            values = [f"{y[np.isfinite(y)][0]:g}" for y in there.values()]
            still += [f"{title}: {' and '.join(dict.fromkeys(values))}"]
            continue
        lines = [Line(name, x, y, i) for i, (name, y) in enumerate(there.items())]
        last = [line.y[np.isfinite(line.y)][-1] for line in lines]
        found.append(chart(title, lines, note=f"last {last[0]:.3g}" if len(last) == 1 else ""))
    return found + unchanged(still)


def constant(values: Floats) -> bool:
    """Whether the finite values, of which there are some, are all one."""
    known = values[np.isfinite(values)]
    return bool((known == known[0]).all())


def unchanged(texts: Sequence[str]) -> list[str]:
    """A card of metrics that have no chart as they never changed; none without any."""
    lines = "".join(f"<li>{esc(text)}</li>" for text in texts)
    card = f'<div class="card"><b>The same in every update</b><ul>{lines}</ul></div>'
    return [card] if texts else []


def clock(run: Run) -> list[str]:
    """Seconds of an update by phase, images/s, memory, MFU, the judges' queue."""
    x = column(run.timings, "step")
    phases = dict.fromkeys(n for row in run.timings for n in row.get("phases_s") or {})
    parts = {n: column([row.get("phases_s") or {} for row in run.timings], n) for n in phases}
    kinds = dict.fromkeys(n for row in run.timings for n in row.get("memory_mib") or {})
    held = {n: column([row.get("memory_mib") or {} for row in run.timings], n) for n in kinds}
    rate = column(run.timings, "images_per_s")
    images = [Line("images/s", x, rate, 0, "pale"), Line("images/s", x, smooth(rate), 0)]
    memory = [Line(name, x, y / 1024, i) for i, (name, y) in enumerate(held.items())]
    rest = []
    for title, key, names in (
        ("MFU", "mfu", ("step", "rollout", "update")),
        ("chunks that waited for judges", "judges", ("queue_mean", "queue_max")),
    ):
        known = {n: column([row.get(key) or {} for row in run.timings], n) for n in names}
        there = [(n, y) for n, y in known.items() if np.isfinite(y).any()]
        lines = [Line(n, x, y, i) for i, (n, y) in enumerate(there)]
        rest += [chart(title, lines)] if lines else []
    return [
        stack("seconds of an update, by phase", x, parts),
        chart("images/s", images),
        chart("memory, GiB", memory, note=" and ".join(held) if len(held) == 1 else ""),
        *rest,
    ]


def other(run: Run) -> list[str]:
    """Every other metric that changed at all, in a chart of its own."""
    known = {"reward", *(name for names in POLICY.values() for name in names)}
    names = [n for n in run.names() if n not in known and not n.startswith(JUDGES)]
    x, found = run.column("step"), []
    for name in names:
        y = run.column(name)
        if len(np.unique(y[np.isfinite(y)])) > 1:
            found.append(chart(name, [Line(name, x, y, 7, "pale"), Line(name, x, smooth(y), 7)]))
    return found
