"""Drawn faces with identities, for tests of the face judge and the tiny world.

An identity is 26 numbers and four choices: colours of skin, hair, eyes and lips, proportions, hair,
brows, glasses, beard. A view is how it is seen once: place, size, tilt, turn, smile, open mouth,
lid, light. Of a face drawn at `middle` with `radius` (half its height, pixels) the box and the five
landmarks of `rewards/face_align.py` are known exactly.

faces/detector.onnx and faces/embedder.onnx beside this file know these faces alone (build them anew
with `python -m qirl_fast.tiny faces`); they have the formats of SCRFD and ArcFace files.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

MODELS = Path(__file__).parent / "faces"
DETECTOR, EMBEDDER = MODELS / "detector.onnx", MODELS / "embedder.onnx"
SMOOTH = 2  # drawn this much larger, then averaged

Colour = tuple[int, int, int]
_AROUND = np.linspace(0, 2 * np.pi, 25)[:-1]
CIRCLE = np.stack([np.cos(_AROUND), np.sin(_AROUND)], 1)


@dataclass(frozen=True)
class Identity:
    """Who it is. Lengths are in units of half the face's height."""

    skin: Colour
    hair: Colour
    iris: Colour
    lips: Colour
    width: float
    jaw: float
    eyes_apart: float
    eye: float
    brow: float
    brow_tilt: float
    nose: float
    mouth: float
    style: int  # 0 bald, 1 short, 2 fringe, 3 long, 4 a crest
    glasses: int  # 0 none, 1 round, 2 square
    beard: int  # 0 none, 1 chin, 2 full
    moustache: bool


@dataclass(frozen=True)
class View:
    """How it is seen. middle: (x, y) and radius in pixels. tilt: radians. turn: -1..1 to the side.
    smile: -1..1. mouth, lid: openness 0..1. light: factor on colours.
    """

    middle: tuple[float, float]
    radius: float
    tilt: float = 0.0
    turn: float = 0.0
    smile: float = 0.3
    mouth: float = 0.1
    lid: float = 1.0
    light: float = 1.0


def sample_identity(rng: np.random.Generator) -> Identity:
    """Somebody at random."""
    tone = rng.uniform(0, 1)
    skin = (1 - tone) * np.array([250, 220, 195]) + tone * np.array([95, 58, 40])

    def colour(low: int, high: int) -> Colour:
        r, g, b = rng.integers(low, high, 3).tolist()
        return r, g, b

    return Identity(
        skin=_shade(skin + rng.normal(0, 10, 3), 1.0),
        hair=colour(10, 240),
        iris=colour(20, 220),
        lips=_shade(np.array([190, 60, 70]) + rng.normal(0, 30, 3), 1.0),
        width=rng.uniform(0.64, 0.95),
        jaw=rng.uniform(0.0, 1.0),
        eyes_apart=rng.uniform(0.28, 0.44),
        eye=rng.uniform(0.09, 0.17),
        brow=rng.uniform(0.02, 0.09),
        brow_tilt=rng.uniform(-0.08, 0.08),
        nose=rng.uniform(0.05, 0.17),
        mouth=rng.uniform(0.18, 0.38),
        style=int(rng.integers(5)),
        glasses=int(rng.choice([0, 0, 1, 2])),
        beard=int(rng.choice([0, 0, 1, 2])),
        moustache=bool(rng.random() < 0.3),
    )


def sample_view(rng: np.random.Generator, middle: tuple[float, float], radius: float) -> View:
    """A look at random from there."""
    return View(
        middle,
        radius,
        tilt=float(rng.normal(0, 0.13)),
        turn=float(rng.uniform(-0.5, 0.5)),
        smile=float(rng.uniform(-0.8, 1.0)),
        mouth=float(rng.uniform(0, 1) ** 2),
        lid=float(rng.uniform(0.35, 1.0)),
        light=float(rng.uniform(0.75, 1.2)),
    )


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A plain colour with shapes on it, some of the colour of skin: uint8 [size, size, 3]."""
    picture = Image.new("RGB", (size, size), tuple(rng.integers(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(0, 6)):
        x, y = rng.uniform(-0.2, 1, 2) * size
        w, h = rng.uniform(0.1, 0.6, 2) * size
        skin = sample_identity(rng).skin
        fill = skin if rng.random() < 0.3 else tuple(rng.integers(0, 256, 3).tolist())
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x, y, x + w, y + h), fill=fill)
    return np.array(picture)


def place(image_HW3: np.ndarray, who: Identity, view: View) -> np.ndarray:
    """The uint8 image with that face drawn on it."""
    height, width = image_HW3.shape[:2]
    picture = Image.fromarray(image_HW3).resize(
        (width * SMOOTH, height * SMOOTH), Image.Resampling.NEAREST
    )
    _Pen(ImageDraw.Draw(picture), view).face(who)
    return np.asarray(picture.reduce(SMOOTH))


def landmarks(who: Identity, view: View) -> np.ndarray:
    """Eyes, tip of the nose, corners of the mouth, left ones first: float [5, 2] in pixels."""
    corner = 0.52 - 0.06 * view.smile
    points = [
        [-who.eyes_apart, -0.12],
        [who.eyes_apart, -0.12],
        [0.0, 0.22],
        [-who.mouth, corner],
        [who.mouth, corner],
    ]
    depth = [1.0, 1.0, 1.6, 1.1, 1.1]
    return _seen(np.array(points), view, np.array(depth))


def box(who: Identity, view: View) -> np.ndarray:
    """[x0, y0, x1, y1] of the head without hair, in pixels."""
    outline = _seen(CIRCLE * [who.width, 1.0], view)
    return np.concatenate([outline.min(0), outline.max(0)])


def _seen(points: np.ndarray, view: View, depth: Any = 0.0) -> np.ndarray:
    """Pixels of points in units of half the face's height; depth: how far a turn moves them."""
    x = points[:, 0] * (1 - 0.15 * abs(view.turn)) + 0.2 * view.turn * depth
    turned = x + 1j * points[:, 1]
    z = turned * np.exp(1j * view.tilt) * view.radius + complex(*view.middle)
    return np.stack([z.real, z.imag], 1)


def _shade(colour: Any, light: float) -> Colour:
    r, g, b = (np.asarray(colour) * light).clip(0, 255).astype(int).tolist()
    return r, g, b


@dataclass(frozen=True)
class _Pen:
    draw: ImageDraw.ImageDraw
    view: View

    def shape(self, points: Any, colour: Any, depth: float = 1.0) -> None:
        seen = (_seen(np.asarray(points), self.view, depth) + 0.5) * SMOOTH
        self.draw.polygon([tuple(p) for p in seen.tolist()], fill=_shade(colour, self.view.light))

    def oval(self, x: float, y: float, w: float, h: float, colour: Any, depth: float = 1.0) -> None:
        self.shape(CIRCLE * [w, h] + [x, y], colour, depth)

    def face(self, who: Identity) -> None:
        if who.style == 3:
            self.oval(0, 0.1, who.width + 0.2, 1.2, who.hair, 0.0)
        elif who.style:
            self.oval(0, -0.25, who.width + 0.1, 0.9, who.hair, 0.0)
        self.oval(-who.width, 0.0, 0.12, 0.2, who.skin, -0.3)
        self.oval(who.width, 0.0, 0.12, 0.2, who.skin, -0.3)
        x, y = CIRCLE.T
        square = np.sign(x) * np.abs(x) ** (1 - 0.5 * who.jaw * (y > 0)) * who.width
        head = np.stack([square, y], 1)
        self.shape(head, who.skin, 0.0)
        if who.beard:
            self.shape(head[(y > (0.1 if who.beard == 2 else 0.6))], who.hair, 0.0)
            if who.beard == 2:
                self.oval(0, 0.3, 0.75 * who.width, 0.4, who.skin, 0.3)
        self.hair(who)
        self.eyes(who)
        self.shape(
            [[0, -0.05], [-who.nose, 0.24], [who.nose, 0.24]], np.array(who.skin) * 0.75, 1.6
        )
        if who.moustache:
            self.oval(0, 0.37, 0.9 * who.mouth, 0.07, who.hair, 1.1)
        self.lips(who)

    def hair(self, who: Identity) -> None:
        x, y = CIRCLE.T
        cap = np.stack([x * who.width, y], 1)[y < -0.45]
        if who.style in (1, 2, 3):
            self.shape(cap, who.hair, 0.0)
        if who.style == 2:
            self.shape(
                [[-0.8 * who.width, -0.7], [0.8 * who.width, -0.7], [0, -0.3]], who.hair, 0.3
            )
        if who.style == 4:
            self.shape([[-0.15, -0.6], [0.15, -0.6], [0.25, -1.4], [-0.25, -1.4]], who.hair, 0.0)

    def eyes(self, who: Identity) -> None:
        for side in (-1, 1):
            x, e, lid = side * who.eyes_apart, who.eye, self.view.lid
            if who.glasses:
                frame = CIRCLE if who.glasses == 1 else [[-1, -1], [1, -1], [1, 1], [-1, 1]]
                self.shape(np.array(frame) * 0.24 + [x, -0.12], (25, 25, 30))
                self.shape(np.array(frame) * 0.19 + [x, -0.12], np.array(who.skin) * 0.5 + 110)
            self.oval(x, -0.12, 1.3 * e, e * lid, (250, 250, 250))
            self.oval(x, -0.12, 0.75 * e, 0.75 * e * lid, who.iris)
            self.oval(x, -0.12, 0.3 * e, 0.3 * e * lid, (10, 10, 10))
            inner, outer = x - side * 0.13, x + side * 0.15
            y, t = -0.38, who.brow_tilt
            brow = [[inner, y + t], [outer, y - t], [outer, y - t + who.brow]]
            self.shape([*brow, [inner, y + t + who.brow]], np.array(who.hair) * 0.7)

    def lips(self, who: Identity) -> None:
        x = np.linspace(-1, 1, 9)
        bend = 0.06 * self.view.smile * (1 - 2 * x**2)
        thick = (0.03 + 0.12 * self.view.mouth) * (1 - x**2)
        for scale, colour in ((1.0, who.lips), (0.55, (70, 15, 20))):
            top, low = 0.52 + bend - 0.035 - scale * thick, 0.52 + bend + 0.035 + scale * thick
            if scale < 1:
                top, low = 0.52 + bend - scale * thick, 0.52 + bend + scale * thick
            upper, lower = np.stack([x, top], 1), np.stack([x, low], 1)[::-1]
            self.shape(np.concatenate([upper, lower]) * [who.mouth * scale, 1], colour, 1.1)
