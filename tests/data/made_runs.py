"""Folders of runs made up for tests of the pages: a trainer's files, from given numbers."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import yaml

JUDGES = ("alignment", "aesthetics")
VOID = {"meta", "img", "br", "link", "input", "hr"}


def settings(name: str, steps: int, **more: Any) -> dict[str, Any]:
    return {
        "run": name,
        "output": "outputs",
        "seed": 0,
        "algorithm": {"name": "grpo"},
        "model": {"path": "tiny"},
        "data": {"train": "tiny:train", "heldout": "tiny:heldout"},
        "rollout": {"height": 64, "width": 64, "guidance": 1.5},
        "rewards": {"alignment": 0.7, "aesthetics": 0.3},
        "watch": [],
        "judges": {},
        "train": {"steps": steps, "replay_steps": 1},
        "evaluation": {"samples_per_prompt": 1, "steps": 6, "guidance": 1.5, "seed": 1234},
    } | more


def metric_rows(updates: int, judges: tuple[str, ...] = JUDGES) -> list[dict[str, Any]]:
    """A run in which nothing is wrong: rewards rise a little, diversity stays."""
    noise = np.random.default_rng(0).normal(size=(updates, 2)) * 0.01
    rows = []
    for u in range(updates):
        row = {"step": u + 1, "reward": 0.5 + 0.2 * u / updates + noise[u, 0], "diversity": 20.0}
        row |= {"clip_fraction": 0.1, "approx_kl": 1e-4 * u, "ratio_error": 0.0, "loss": 0.0}
        row |= {"pre_update_ratio_error": 0.0, "pre_update_clip_fraction": 0.0, "kept_groups": 1.0}
        for name in judges:
            row |= {f"reward/{name}": 0.5 + 0.1 * u / updates + noise[u, 1], f"std/{name}": 0.1}
            row |= {f"failed/{name}": 0.0, f"missing/{name}": 0.0, f"flat/{name}": 0.0}
        rows.append({k: float(v) if k != "step" else v for k, v in row.items()})
    return rows


def pictures(count: int, size: int = 64, seed: int = 0) -> np.ndarray:
    """Noise uint8 [count, size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def write_held(
    path: Path,
    images: np.ndarray,
    scores: dict[str, np.ndarray],
    texts: list[str] | None = None,
    ids: list[str] | None = None,
    **more: Any,
) -> None:
    count = len(images)
    texts = texts or [f"a photo of thing {i}" for i in range(count)]
    rows = json.dumps([{"prompt": text, "category": None} for text in texts])
    arrays = {f"image_{i}": image for i, image in enumerate(images)}
    arrays |= {f"score_{name}": np.asarray(s, np.float64) for name, s in scores.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    rows_ = np.frombuffer(rows.encode(), np.uint8)
    np.savez(path, prompts=np.array(ids or [f"{i:016x}" for i in range(count)]), rows=rows_,
             **arrays, **more)  # fmt: skip


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(
    folder: Path,
    *,
    updates: int = 40,
    prompts: int = 6,
    size: int = 64,
    texts: list[str] | None = None,
    ids: list[str] | None = None,
    strips: tuple[int, ...] = (10, 20, 30),
    rows: list[dict[str, Any]] | None = None,
    lift: float = 0.2,
    names: tuple[str, ...] = JUDGES,
    **more: Any,
) -> Path:
    """A finished run; more: sections of its settings. `lift`: of every judge's held-out scores."""
    (folder / "samples").mkdir(parents=True)
    recipe = settings(folder.name, updates, **more)
    (folder / "config.resolved.yaml").write_text(
        yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False)
    )
    write_rows(folder / "metrics.jsonl", rows or metric_rows(updates, names))
    clock = {"phases_s": {"rollout": 1.0, "update": 0.5}, "seconds": 1.5, "images_per_s": 20.0}
    clock |= {"memory_mib": {"process": 512.0}}
    write_rows(folder / "timings.jsonl", [{"step": u + 1, **clock} for u in range(updates)])
    summary = {"steps": updates, "judges": {}, "versions": {"torch": "2"}, "commit": "unknown"}
    (folder / "summary.json").write_text(json.dumps(summary))
    base = np.random.default_rng(1).uniform(0.2, 0.6, prompts)
    jitter = np.random.default_rng(2).uniform(0, 0.05, prompts)
    old = dict.fromkeys(names, base)
    new = dict.fromkeys(names, base + lift + jitter)
    write_held(folder / "samples/before.npz", pictures(prompts, size), old, texts, ids)
    write_held(folder / "samples/after.npz", pictures(prompts, size, 1), new, texts, ids,
               update=np.array(updates))  # fmt: skip
    for k in strips:
        few = {
            f"image_{i}": im for i, im in enumerate(pictures(min(8, prompts), min(size, 256), k))
        }
        np.savez(folder / f"samples/strip-{k}.npz", **few)
    return folder


class Page(HTMLParser):
    """A page, read: text, tags with their attributes; every element is closed in its order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.parts: list[str] = []
        self.html = html
        self.feed(html)
        self.close()
        assert not self.open, self.open
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.parts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def require_self_contained(self, limit: int = 8_000_000) -> None:
        """Nothing is loaded, nothing runs, and it is small."""
        assert len(self.html.encode()) < limit
        found = {name for name, _ in self.tags}
        assert not found & {"script", "link", "iframe", "object", "embed", "base", "form", "a"}
        for tag, attributes in self.tags:
            for name, value in attributes.items():
                assert not name.startswith("on") and name not in ("href", "srcset", "action")
                assert name != "src" or (tag == "img" and str(value).startswith("data:image/webp"))
        assert "url(" not in self.html and "@import" not in self.html
        assert "\0" not in self.html and "\1" not in self.html
