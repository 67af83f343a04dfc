"""`python -m bench soak`: thousands of small steps; memory, files and step time must stay flat.

A run of the packaged model (8 images a step, a checkpoint a step) as a person starts it; its
process is looked at from outside. Flat: over the second half of the steps the fitted line rises by
less than RISE of the median; of the first half caches and allocators take their share.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.machine import about

RISE = 0.05
POLL_S = 0.5
SETTINGS = (
    "threads=1",
    "train={warmup: 0, decay: 0, lr: 1.0e-4}",
    "data.prompts_per_step=2",
    "rollout={group_size: 4, max_rows: 4}",
    "evaluation={prompts: 2, samples_per_prompt: 1, steps: 2}",
    "tracking={checkpoint_every: 1, keep_checkpoints: 2}",
)


def looked_at(pid: int) -> tuple[float, int, int]:
    """Resident MiB, open files, threads of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = dict(line.split(":", 1) for line in status.splitlines())
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return int(found["VmRSS"].split()[0]) / 1024, files, int(found["Threads"])


def rise(values: list[float]) -> float:
    """Of the line fitted to the second half: its rise, as a share of the median."""
    half = np.array(values[len(values) // 2 :])
    slope = np.polyfit(np.arange(len(half)), half, 1)[0]
    return float(slope * (len(half) - 1) / np.median(half))


def run(
    steps: int, folder: Path, out: Path | None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The result; `out` is written at the end, with a plot. RuntimeError where the run failed."""
    words = [*SETTINGS, f"train.steps={steps}", f"output={folder}", "run=soak"]
    log = folder / "soak.log"
    folder.mkdir(parents=True, exist_ok=True)
    seen: dict[str, list[float]] = {"step": [], "rss_mib": [], "files": [], "threads": []}
    timings = folder / "soak" / "timings.jsonl"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "qirl_fast.train", *words], stdout=stream, stderr=stream
        )
        while process.poll() is None:
            done = timings.read_text().count("\n") if timings.exists() else 0
            try:
                found = looked_at(process.pid)
            except (FileNotFoundError, KeyError, ProcessLookupError):
                break  # it has ended meanwhile
            if 0 < done < steps:
                for name, value in zip(seen, (done, *found), strict=True):
                    seen[name].append(value)
            time.sleep(POLL_S)
    if process.wait():
        raise RuntimeError(f"the run ended with status {process.returncode}: see {log}")
    rows = [json.loads(line) for line in timings.read_text().splitlines()]
    seconds = [row["seconds"] for row in rows]
    rises = {name: rise(seen[name]) for name in ("rss_mib", "files", "threads")}
    rises["step_s"] = rise([float(np.median(s)) for s in np.array_split(seconds, min(40, steps))])
    result = about("cpu") | {"steps": steps, "seconds": seconds, "seen": seen, "rises": rises}
    result["flat"] = all(value < RISE for value in rises.values())
    for name, value in rises.items():
        say(f"{name:8} {value:+.1%} over the second half")
    say("flat" if result["flat"] else f"NOT flat: something rose by {RISE:.0%} or more")
    if out is not None:
        out.write_text(json.dumps(result) + "\n")
        out.with_suffix(".md").write_text(markdown(result))
        plot(result, out.with_suffix(".png"))
    return result


def markdown(result: dict[str, Any]) -> str:
    """The table of a result."""
    machine = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    seen = result["seen"] | {"step_s": result["seconds"]}
    lines = [
        f"Commit {result['commit'][:12]}, {result['date']}; {machine}. {result['steps']} steps; a "
        "line is fitted to the second half of what was seen of them.",
        "",
        "| what | median of the second half | moves by |",
        "|---|---|---|",
    ]
    for name, rise_ in result["rises"].items():
        median = np.median(seen[name][len(seen[name]) // 2 :])
        lines.append(f"| {name} | {median:.3g} | {rise_:+.1%} |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Memory, files and step time by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, figsize=(8, 7), sharex=True, layout="constrained")
    seen = result["seen"]
    axes[0].plot(seen["step"], seen["rss_mib"])
    axes[0].set_ylabel("resident MiB")
    axes[1].plot(seen["step"], seen["files"], label="open files")
    axes[1].plot(seen["step"], seen["threads"], label="threads")
    axes[1].legend()
    axes[2].plot(range(1, result["steps"] + 1), result["seconds"], ".", markersize=2)
    axes[2].set_ylabel("seconds of a step")
    axes[2].set_xlabel("step")
    for ax in axes:
        ax.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
