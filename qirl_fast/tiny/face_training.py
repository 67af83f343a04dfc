"""Trains the detector and the embedder of drawn faces and writes them as ONNX files.

Detector, SCRFD's form: convolutions down to strides 8, 16 and 32, at each two anchors a cell (x, y)
for faces of the sizes in SIZES; per anchor a score after a sigmoid, the box's distances (l, t, r,
b) from stride (x, y) and five points from there, all in units of the stride. Loss: focal (gamma 2)
on scores, summed over anchors, and absolute errors at those of a face, per face's anchor.

Embedder, ArcFace's form: an aligned face RGB in (pixel - 127.5) / 127.5 to 32 numbers. Loss: of B
people seen twice, the cross-entropy of finding each one's second view among all second views and
the other way, on cosines / 0.1, so that strangers' cosines go to 0 or below.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qirl_fast.rewards.face_align import SIDE, aligned
from qirl_fast.tiny import faces

PICTURE = 128  # pixels of a side that the detector sees
STRIDES = (8, 16, 32)
SIZES = ((0, 24, 36), (36, 56, 80), (80, 104, 999))  # of the longer side, by stride and anchor
MIRRORED = [1, 0, 2, 4, 3]  # the points of a face seen in a mirror

Report = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Recipe:
    """Seed and lengths; `people` are seen `views` times each for the embedder."""

    seed: int = 0
    scenes: int = 4000
    detector_steps: int = 2000
    detector_batch: int = 24
    people: int = 1000
    views: int = 3
    embedder_steps: int = 300
    embedder_batch: int = 64


def _block(into: int, out: int, stride: int = 2, deep: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    if deep:  # looks further for few weights: by channel, then by pixel
        layers += [
            nn.Conv2d(out, out, 3, 1, 1, groups=out, bias=False),
            nn.Conv2d(out, out, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class Detector(nn.Module):
    """Pictures [B, 3, 128, 128] to scores [B, N, 1], distances [B, N, 4], points [B, N, 10], each
    by stride, N = 2 (128 / stride)^2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_block(3, 8, deep=False), _block(8, 16))
        self.levels = nn.ModuleList([_block(16, 32), _block(32, 40), _block(40, 48)])
        self.heads = nn.ModuleList([nn.Conv2d(c, 2 * 15, 1) for c in (32, 40, 48)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Scores of the three strides, then distances, then points."""
        x, found = self.stem(x), []
        for level, head in zip(self.levels, self.heads, strict=True):
            x = level(x)
            found.append(head(x).permute(0, 2, 3, 1).reshape(len(x), -1, 15))
        scores = [f[..., :1].sigmoid() for f in found]
        return (*scores, *(f[..., 1:5] for f in found), *(f[..., 5:] for f in found))


class Embedder(nn.Module):
    """Aligned faces [B, 3, 112, 112] to vectors [B, 32], of any length."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 8, 12, 16, 24, 32]
        blocks = [_block(a, b) for a, b in pairwise(widths)]
        self.body = nn.Sequential(*blocks, nn.Conv2d(32, 12, 1))
        self.out = nn.Linear(12 * 16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x).flatten(1))


def draw_scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture uint8 [128, 128, 3] with up to three faces: boxes [n, 4], points [n, 5, 2]."""
    image = faces.background(rng, PICTURE)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        radius = float(np.exp(rng.uniform(np.log(9), np.log(56))))
        middle = rng.uniform(0.8 * radius, PICTURE - 0.8 * radius, 2)
        who, view = faces.sample_identity(rng), faces.sample_view(rng, (*middle,), radius)
        new = faces.box(who, view)
        if all((new[:2] > b[2:] + 2).any() or (new[2:] < b[:2] - 2).any() for b, _ in found):
            image = faces.place(image, who, view)
            found.append((new, faces.landmarks(who, view)))
    noise = rng.normal(0, rng.uniform(0, 8), image.shape)
    image = (image + noise).clip(0, 255).astype(np.uint8)
    boxes = np.array([b for b, _ in found]).reshape(-1, 4)
    return image, boxes, np.array([p for _, p in found]).reshape(-1, 5, 2)


def draw_face(rng: np.random.Generator, who: faces.Identity) -> np.ndarray:
    """One aligned view of somebody, the landmarks as inexact as the detector's: [112, 112, 3]."""
    radius = float(rng.uniform(14, 52))
    view = faces.sample_view(rng, (64 + rng.normal(0, 4), 64 + rng.normal(0, 4)), radius)
    image = faces.place(faces.background(rng, PICTURE), who, view)
    points = faces.landmarks(who, view) + rng.normal(0, 0.05 * radius, (5, 2))
    crop = aligned(image, points) + rng.normal(0, rng.uniform(0, 8), (SIDE, SIDE, 3))
    return crop.clip(0, 255).astype(np.uint8)


def targets(boxes: np.ndarray, points: np.ndarray) -> list[np.ndarray]:
    """By stride [N, 15]: is it a face's anchor, its distances and points."""
    found = []
    longer = (boxes[:, 2:] - boxes[:, :2]).max(1)
    for stride, sizes in zip(STRIDES, SIZES, strict=True):
        n = PICTURE // stride
        y, x = np.mgrid[:n, :n] * float(stride)
        want = np.zeros((n, n, 2, 15), np.float32)
        for box, marks, size in zip(boxes, points, longer, strict=True):
            anchor = int(np.searchsorted(sizes, size, "right")) - 1
            if anchor not in (0, 1):
                continue
            cx, cy = (box[:2] + box[2:]) / 2
            near = np.maximum(abs(x - cx), abs(y - cy)) <= 0.75 * stride
            here = np.stack([x[near], y[near]], 1)
            want[near, anchor, 0] = 1
            want[near, anchor, 1:5] = np.hstack([here - box[:2], box[2:] - here]) / stride
            want[near, anchor, 5:] = (marks.reshape(1, 10) - np.tile(here, 5)) / stride
        found.append(want.reshape(-1, 15))
    return found


def train_detector(recipe: Recipe, report: Report) -> Detector:
    """The detector, in evaluation mode."""
    rng, model = np.random.default_rng(recipe.seed), Detector()
    scenes = [draw_scene(rng) for _ in range(recipe.scenes)]
    step = _steps(model, recipe.detector_steps, 4e-3)
    for i in range(recipe.detector_steps):
        pictures, wants = [], []
        for k in rng.integers(0, len(scenes), recipe.detector_batch):
            image, boxes, points = scenes[k]
            if rng.random() < 0.5:
                image = image[:, ::-1]
                boxes = np.array([PICTURE, 0, PICTURE, 0]) - boxes * [1, -1, 1, -1]
                boxes = boxes[:, [2, 1, 0, 3]]
                points = (np.array([PICTURE, 0]) - points * [1, -1])[:, MIRRORED]
            pictures.append((image * rng.uniform(0.8, 1.2, 3)).clip(0, 255))
            wants.append(np.concatenate(targets(boxes, points)))
        x = torch.tensor(np.stack(pictures), dtype=torch.float32).permute(0, 3, 1, 2)
        found = model((x - 127.5) / 128)
        want = torch.tensor(np.stack(wants))
        p, shape = (
            torch.cat(found[:3], 1)[..., 0],
            torch.cat([torch.cat(found[3:6], 1), torch.cat(found[6:], 1)], 2),
        )
        face = want[..., 0] > 0
        right = torch.where(face, p, 1 - p).clamp(1e-6, 1)
        focal = (-((1 - right) ** 2) * right.log() * torch.where(face, 1.0, 0.5)).sum()
        count = face.sum().clamp(min=1)
        size = want[face][:, 1:5].mean(1, keepdim=True)  # errors as shares of the face
        off = ((shape[face] - want[face][:, 1:]).abs() / size).mean(1).sum()
        loss = (focal + 4 * off) / count
        step(loss)
        report("detector", i + 1, recipe.detector_steps, {"loss": loss.item()})
    return model.eval()


def train_embedder(recipe: Recipe, report: Report) -> Embedder:
    """The embedder, in evaluation mode."""
    rng, model = np.random.default_rng(recipe.seed + 1), Embedder()
    people = [faces.sample_identity(rng) for _ in range(recipe.people)]
    seen = np.stack([[draw_face(rng, who) for _ in range(recipe.views)] for who in people])
    step = _steps(model, recipe.embedder_steps, 4e-3)
    for i in range(recipe.embedder_steps):
        who = rng.choice(len(people), min(recipe.embedder_batch, len(people)), replace=False)
        pair = np.stack([rng.choice(recipe.views, 2, replace=False) for _ in who])
        x = torch.tensor(seen[who[:, None], pair], dtype=torch.float32).flatten(0, 1)
        x = x * torch.tensor(rng.uniform(0.85, 1.15, (len(x), 1, 1, 1)), dtype=torch.float32)
        vectors = F.normalize(model((x.permute(0, 3, 1, 2) - 127.5) / 127.5), dim=1)
        cosines = vectors[::2] @ vectors[1::2].T / 0.1
        label = torch.arange(len(who))
        loss = (F.cross_entropy(cosines, label) + F.cross_entropy(cosines.T, label)) / 2
        step(loss)
        report("embedder", i + 1, recipe.embedder_steps, {"loss": loss.item()})
    return model.eval()


def _steps(model: nn.Module, steps: int, rate: float) -> Callable[[Tensor], None]:
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, 2))

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    return step


def build(folder: Path, recipe: Recipe, report: Report) -> None:
    """Train both and write detector.onnx and embedder.onnx."""
    torch.manual_seed(recipe.seed)
    detector, embedder = train_detector(recipe, report), train_embedder(recipe, report)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{part}_{stride}" for part in ("score", "bbox", "kps") for stride in STRIDES]
    write(_Flat(detector), PICTURE, folder / faces.DETECTOR.name, names)
    write(embedder, SIDE, folder / faces.EMBEDDER.name, ["embedding"])


class _Flat(nn.Module):
    """The detector on one picture, its outputs [N, C], as SCRFD's files have them."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(found[0] for found in self.detector(x))


def write(model: nn.Module, side: int, path: Path, outputs: list[str]) -> None:
    """Save a network that takes one picture; ImportError without the package onnx."""
    try:
        import onnx  # noqa: F401 - the exporter wants it
    except ImportError as error:
        raise ImportError(
            "writing ONNX wants onnx: pip install 'qirl-fast[faces-build]'"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this exporter, which needs least, is the older one
        torch.onnx.export(
            model.eval(),
            (torch.zeros(1, 3, side, side),),
            str(path),
            input_names=["input.1"],
            output_names=outputs,
            dynamo=False,
        )
