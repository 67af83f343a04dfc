"""`python -m bench scaling`: how an update scales over processes, predicted and measured.

The model of an update by W processes, n chunks a minibatch:

    T(W) = ceil(n / W) (rollout + replay of a chunk) + rest + G latency(W) + bytes(W) / bandwidth

rest: what every process does by itself: prompts, advantages, optimizer. G: gathers of a few bytes.
bytes(W) = 2 (W - 1) / W x 4 bytes a trained weight, in and out of each process, see distributed.py.
Chunk and rest are measured with one process, latency and bandwidth between two idle ones; the two
predictions are then compared with runs of the packaged recipe. The plan for GPUs is the same sum
with the numbers it names, none of which is measured here.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from bench.machine import about

GATHERS = 8  # of an update: faults, lengths, scores, three agreements, the learner's two
UPDATES = 24
CHUNKS = 4

LINK = """
import json, time
import torch
from torch import distributed as dist
dist.init_process_group("gloo")
def seconds(numel, repeats):
    sent = torch.zeros(numel)
    found = torch.zeros(numel)
    times = []
    for _ in range(repeats):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_to_all_single(found, sent)
        times.append(time.perf_counter() - begin)
    return sorted(times)[repeats // 2]
small, large = seconds(2, 200), seconds(1 << 22, 10)
if dist.get_rank() == 0:
    # Half of what a process of two has goes to the other.
    print(json.dumps({"latency_s": small, "bytes_per_s": (1 << 24) / 2 / (large - small)}))
dist.barrier()
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Machine:
    """What the model needs to know. chunk_s, rest_s: of one process; links between two."""

    chunk_s: float
    rest_s: float
    latency_s: float
    bytes_per_s: float


def predicted(machine: Machine, chunks: int, trained: int, processes: int) -> dict[str, float]:
    """Seconds of an update by part. trained: weights with a gradient, 4 bytes each."""
    volume = 2 * (processes - 1) / processes * 4 * trained
    hops = GATHERS * (processes - 1) if processes > 1 else 0
    return {
        "chunks": ceil(chunks / processes) * machine.chunk_s,
        "rest": machine.rest_s,
        "gathers": hops * machine.latency_s,
        "gradient": volume / machine.bytes_per_s,
    }


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    own |= {"MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return os.environ | {k: str(v) for k, v in own.items()} | {"MASTER_ADDR": "127.0.0.1"}


def together(size: int, command: list[str]) -> str:
    """What the first of `size` processes of the command prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(command, env=environment(r, size, port), stdout=subprocess.PIPE, text=True)
        for r in range(size)
    ]
    outputs = [process.communicate()[0] for process in started]
    for process in started:
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    return outputs[0]


def measured(size: int, folder: Path) -> dict[str, float]:
    """Median seconds by phase of an update of the packaged recipe by `size` processes."""
    rows = 30  # of a chunk, as one prompt has samples
    settings = [f"data.prompts_per_step={CHUNKS}", f"rollout.max_rows={rows}", "threads=1"]
    settings += [f"train.steps={UPDATES}", "train.decay=0", "evaluation.prompts=2"]
    settings += [f"output={folder}", f"run=by{size}", "tracking.checkpoint_every=0"]
    settings += [f"rollout.group_size={rows}"]
    together(size, [sys.executable, "-m", "qirl_fast.train", *settings])
    lines = (folder / f"by{size}" / "timings.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines][2:]  # the first updates meet cold caches
    phases = {name for row in found for name in row["phases_s"]}
    medians = {p: statistics.median(r["phases_s"].get(p, 0.0) for r in found) for p in phases}
    return medians | {"update_s": statistics.median(r["seconds"] for r in found)}


PLAN = {  # Qwen-Image, 20 B, LoRA of rank 64 on attention; assumptions, not measurements
    "trained": 60 * 8 * 64 * 2 * 3072,  # 60 blocks, 8 layers of 3072 x 3072
    # 8 samples of 512 px with 128 tokens of text; 10 guided steps, 2 replayed at three forwards
    # each; at 400 TFLOP/s.
    "chunk_s": 8 * (2 * 20e9 * (1024 + 128)) * (10 * 2 + 2 * 3) / 400e12,
    "rest_s": 0.2,
    "latency_s": 30e-6,
    "bytes_per_s": {8: 200e9, 64: 25e9, 1024: 25e9},  # NVLink; 200 Gbit/s a GPU between machines
}


def plan() -> list[dict[str, Any]]:
    """One row for each number of GPUs, two chunks each."""
    rows = []
    for gpus, bandwidth in PLAN["bytes_per_s"].items():
        machine = Machine(PLAN["chunk_s"], PLAN["rest_s"], PLAN["latency_s"], bandwidth)
        parts = predicted(machine, 2 * gpus, PLAN["trained"], gpus)
        whole = sum(parts.values())
        alone = sum(predicted(machine, 2 * gpus, PLAN["trained"], 1).values())
        rows.append(
            {"gpus": gpus, "update_s": whole, "efficiency": alone / gpus / whole, "parts_s": parts}
            | {"sent_bytes": 2 * (gpus - 1) / gpus * 4 * PLAN["trained"]}
        )
    return rows


def run(out: Path | None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The result; `out` is written at the end, with a table beside it."""
    link = json.loads(together(2, [sys.executable, "-c", LINK]))
    with tempfile.TemporaryDirectory() as place:
        found = {size: measured(size, Path(place)) for size in (1, 2)}
        summary = Path(place, "by1", "checkpoints", "latest", "lora", "adapter_model.safetensors")
        trained = summary.stat().st_size // 4
    one = found[1]
    chunk_s = (one["rollout"] + one.get("reward", 0.0) + one["update"]) / CHUNKS
    machine = Machine(chunk_s, one["data"], link["latency_s"], link["bytes_per_s"])
    rows = []
    for size, seen in found.items():
        parts = predicted(machine, CHUNKS, trained, size)
        rows.append(
            {"processes": size, "predicted_s": sum(parts.values()), "parts_s": parts}
            | {"measured_s": seen["update_s"], "phases_s": seen}
        )
        say(f"{size} processes: {sum(parts.values()):.3f} s predicted, {seen['update_s']:.3f} s")
    settings = {"chunks": CHUNKS, "updates": UPDATES, "trained": trained}
    result = about("cpu") | settings | {"link": link, "rows": rows, "plan": plan()}
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
        out.with_suffix(".md").write_text(markdown(result))
    return result


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result."""
    machine = ", ".join(f"{k} {v}" for k, v in result["machine"].items())
    link = result["link"]
    lines = [
        f"Commit {result['commit'][:12]}, {result['date']}; {machine}. {result['chunks']} chunks "
        f"of 30 samples, {result['trained']} trained weights; between two processes "
        f"{link['latency_s'] * 1e6:.0f} us and {link['bytes_per_s'] / 1e9:.1f} GB/s.",
        "",
        "| processes | predicted s | measured s | off | speedup |",
        "|---|---|---|---|---|",
    ]
    first = result["rows"][0]["measured_s"]
    for row in result["rows"]:
        off = row["predicted_s"] / row["measured_s"] - 1
        lines.append(
            f"| {row['processes']} | {row['predicted_s']:.3f} | {row['measured_s']:.3f} | "
            f"{off:+.0%} | {first / row['measured_s']:.2f}x |"
        )
    lines += ["", "| GPUs | update s | chunks | gathers | gradient | sent by each | efficiency |"]
    lines.append("|---" * 7 + "|")
    for row in result["plan"]:
        parts, sent = row["parts_s"], f"{row['sent_bytes'] / 1e9:.2f} GB"
        lines.append(
            f"| {row['gpus']} | {row['update_s']:.1f} | {parts['chunks']:.1f} | "
            f"{parts['gathers']:.3f} | {parts['gradient']:.3f} | {sent} | {row['efficiency']:.1%} |"
        )
    return "\n".join(lines) + "\n"
