"""`python -m bench algorithms`: every recipe of configs/algorithms for the same seconds.

A recipe runs as a user runs it, in a process of its own, one for each core and each on one, until
its updates have taken `seconds`; held-out evaluations run between them and are not counted. What
is compared is the held-out reward under each recipe's own evaluation: ODE, averaged weights, the
same prompts and seeds, guidance as in its rollout. Rewards of rollouts are drawn too, but noise on
the way costs some of them, and an ODE rollout none.

    {"seconds": s, "runs": {recipe: {"updates": n, "seconds": [n], "reward": [n],
                                     "heldout": [[seconds, reward], ...]}}}
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from yaml import safe_load

from bench.machine import about

RECIPES = Path("configs/algorithms")
FOREVER = 100_000  # updates; the seconds end a run
POLL_S = 0.2


@dataclass
class Options:
    """What `python -m bench algorithms` was asked for."""

    seconds: float = 300.0
    every: int = 10
    only: list[str] | None = None
    settings: tuple[str, ...] = ()
    runs: Path = Path("outputs/bench-algorithms")
    out: Path | None = None


def rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a JSONL file that may still be written to."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def clock(folder: Path) -> list[float]:
    """Seconds after each update of a run, evaluations left out."""
    spent = [
        r["seconds"] - r["phases_s"].get("evaluate", 0.0) for r in rows(folder / "timings.jsonl")
    ]
    return np.cumsum(spent).tolist()


def train(recipe: Path, folder: Path, options: Options) -> None:
    """Run until the clock says that the seconds are over; RuntimeError where it ends before."""
    command = [
        *(sys.executable, "-m", "qirl_fast.train", str(recipe), *options.settings),
        *(f"output={folder.parent}", f"run={folder.name}", f"train.steps={FOREVER}"),
        *(f"evaluation.every={options.every}", "tracking.checkpoint_every=0"),
        "tracking.tensorboard=false",
    ]
    log = folder.parent / f"{folder.name}.log"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        try:
            while sum(clock(folder)[-1:]) < options.seconds:
                if process.poll() is not None:
                    raise RuntimeError(f"{recipe} ended by itself; its output is in {log}")
                time.sleep(POLL_S)
        finally:
            process.terminate()
            process.wait()


def measured(folder: Path, seconds: float) -> dict[str, Any]:
    """The curves of a run's folder, up to `seconds`."""
    weights = safe_load((folder / "config.resolved.yaml").read_text())["rewards"]
    whole = sum(weights.values())
    with np.load(folder / "samples" / "before.npz", allow_pickle=False) as saved:
        base = sum(w / whole * float(np.nanmean(saved[f"score_{n}"])) for n, w in weights.items())
    heldout, reward, passed = [[0.0, base]], [], []
    for at, row in zip(clock(folder), rows(folder / "metrics.jsonl"), strict=False):
        if at > seconds and passed:
            break
        passed.append(at)
        reward.append(row["reward"])
        if all(f"heldout/{n}" in row for n in weights):
            found = sum(w / whole * row[f"heldout/{n}"] for n, w in weights.items())
            heldout.append([at, found])
    return {"updates": len(passed), "seconds": passed, "reward": reward, "heldout": heldout}


def recipes(only: list[str] | None) -> Iterator[Path]:
    """The recipes asked for, by name. ValueError for one that is not there."""
    there = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    for name in only or there:
        if name not in there:
            raise ValueError(f"no recipe {name!r} in {RECIPES}; there are {', '.join(there)}")
        yield there[name]


def run(options: Options, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The result; options.out is rewritten after each recipe."""
    cores = len(os.sched_getaffinity(0))
    result: dict[str, Any] = about("cpu") | {
        "seconds": options.seconds,
        "side_by_side": cores,
        "load": os.getloadavg()[0],
        "runs": {},
    }
    options.runs.mkdir(parents=True, exist_ok=True)

    def one(recipe: Path) -> tuple[str, dict[str, Any]]:
        folder = options.runs / recipe.stem
        train(recipe, folder, options)
        return recipe.stem, measured(folder, options.seconds)

    with ThreadPoolExecutor(cores) as pool:
        for name, found in pool.map(one, recipes(options.only)):
            result["runs"][name] = found
            say(f"{name:16} {found['updates']:4} updates  {summary(found)}")
            if options.out is not None:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
                options.out.with_suffix(".md").write_text(markdown(result))
                plot(result, options.out.with_suffix(".png"))
    return result


def tail(values: list[float], share: float = 0.1) -> float:
    """Mean of the last tenth."""
    return float(np.mean(values[-max(1, int(len(values) * share)) :]))


def summary(found: dict[str, Any]) -> str:
    """One run for people."""
    (_, base), (at, last) = found["heldout"][0], found["heldout"][-1]
    return (
        f"rollouts {found['reward'][0]:.3f} -> {tail(found['reward']):.3f}, held out {base:.3f} -> "
        f"{last:.3f} at {at:.0f} s"
    )


def markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    machine = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    lines = [
        f"Commit {result['commit'][:12]}, {result['date']}; {machine}; load {result['load']:.1f} "
        f"at the start. {result['seconds']:g} s of updates each on one core, "
        f"{result['side_by_side']} at a time, without evaluations; one seed.",
        "",
        "| recipe | updates | s / update | held out before | last | at s | rollouts, last tenth |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in result["runs"].items():
        (_, base), (at, last) = found["heldout"][0], found["heldout"][-1]
        each = found["seconds"][-1] / found["updates"]
        lines.append(
            f"| {name} | {found['updates']} | {each:.1f} | {base:.3f} | {last:.3f} | {at:.0f} | "
            f"{tail(found['reward']):.3f} |"
        )
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Held-out rewards and those of the rollouts, by seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, (name, found) in enumerate(result["runs"].items()):
        look = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--", "label": name}
        left.plot(*np.transpose(found["heldout"]), marker=".", **look)
        width = max(1, found["updates"] // 10)
        smooth = np.convolve(found["reward"], np.ones(width) / width, "valid")
        right.plot(found["seconds"][width - 1 :], smooth, **look)
    left.set_ylabel("held-out reward")
    right.set_ylabel("reward of rollouts, moving average")
    for axes in (left, right):
        axes.set_xlabel("seconds of updates")
    right.legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
