"""Whether the people of an edited picture are still the same, in [0, 1]: `kind: face`.

Faces of source and result are found, aligned and embedded (`face_onnx.py`, `face_library.py`). With
S the source's faces whose box is at least `min_face` pixels on its shorter side, R the result's of
at least half of that, and c_sr the cosines of their embeddings,

    v_sr  = clip((c_sr - different) / (same - different), 0, 1)
    score = max over one-to-one matchings M of sum over (s, r) in M of v_sr / (|S| + extra)
    extra = max(0, faces of R that M leaves over, of min_face pixels or more, less the source's
            faces that are too small to be judged)

- no face to judge in the source: missing. No face left in the result: 0, a verdict.
- several faces: every one counts alike, and each face of the result answers for one of the source.
- a false second face: matching is one to one and a face too many is one more to divide by, so a
  person pasted beside another's face scores 1/2 at most, and a stranger beside the right one too.
- `min_face` is halved in the result lest a face at the limit is lost to a pixel.
- a row without condition images is missing; what cannot be embedded has failed. Never NaN.

Which faces are S: those of the edited picture (the last condition image), or with `sources: all`
those of every condition image, for edits that bring people together. An instruction that adds,
removes or exchanges people is not for this judge: give its rows a category where it weighs 0.
"""

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field
from scipy.optimize import linear_sum_assignment

from qirl_fast.rewards.judge import FAILED, MISSING, SCORED, Row, Scored
from qirl_fast.rewards.segment import check_images
from qirl_fast.rewards.sources import condition_images, has_sources
from qirl_fast.section import Count, Level, Positive, Section, Text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Face:
    """A face found. box: [x0, y0, x1, y1] in pixels. points: float [5, 2] (x, y) as in
    `face_align.py`, None where the library aligns by itself. score: of the detector, 0..1.
    """

    box: np.ndarray
    points: np.ndarray | None
    score: float

    @property
    def side(self) -> float:
        """The box's shorter side in pixels."""
        return float(min(self.box[2] - self.box[0], self.box[3] - self.box[1]))


class FaceModel(Protocol):
    """What the judge runs on; called from several threads. Images are uint8 [H, W, 3]."""

    def detect(self, image_HW3: np.ndarray) -> list[Face]: ...

    def embed(self, image_HW3: np.ndarray, face: Face) -> np.ndarray:
        """Unit vector float [D]; ValueError, with the reason, where there is none."""
        ...


class Settings(Section):
    """A judge of face identity."""

    kind: Literal["face"] = Field(description="cosine of face embeddings, source to result")
    engine: Literal["onnx", "face_recognition"] = Field(
        default="onnx",
        description="ONNX files (detector, embedder), or the face_recognition library",
    )
    detector: Text | None = Field(
        default=None, description="ONNX file: SCRFD with key points (insightface's det_*), or YuNet"
    )
    embedder: Text | None = Field(
        default=None,
        description="ONNX file that takes aligned faces 112 x 112: ArcFace, AdaFace, ...",
    )
    channels: Literal["rgb", "bgr"] = Field(
        default="rgb",
        description="the embedder's order: rgb for ArcFace and SFace, bgr for AdaFace",
    )
    mean: float = Field(default=127.5, description="subtracted from the embedder's pixels, 0..255")
    std: Positive = Field(default=127.5, description="the embedder's pixels are divided by it then")
    detect_side: Count = Field(
        default=640, description="pixels the detector sees of a side, where its file leaves it open"
    )
    min_score: Level = Field(default=0.5, description="the detector's score a face must reach")
    min_face: Positive = Field(
        default=40.0, description="shorter side in pixels from which on a source's face is judged"
    )
    different: float = Field(default=0.0, ge=-1, le=1, description="cosine that scores 0")
    same: float = Field(default=1.0, ge=-1, le=1, description="cosine that scores 1")
    sources: Literal["last", "all"] = Field(
        default="last", description="whose faces should be there: the edited picture's, or of all"
    )
    provider: Literal["cpu", "cuda"] = Field(default="cpu", description="where ONNX files run")
    workers: Count = Field(default=2, description="rows judged at a time, one CPU thread each")


class Judge:
    """The judge of `Settings`.

    Construction raises ImportError for a missing package, with the command that installs it,
    FileNotFoundError for a missing file, and ValueError for one, or a setting, that cannot be used.
    """

    masks = True

    def __init__(self, settings: Settings, device: str = "cpu") -> None:
        if not settings.different < settings.same:
            raise ValueError(
                f"different {settings.different} is not below same {settings.same}; wanted the "
                "cosines that score 0 and 1"
            )
        self.settings = settings
        self.model: FaceModel = _model(settings, device)
        self._pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="face")
        self._told = False

    def check_row(self, row: Row) -> None:
        """ValueError for a row without condition images."""
        condition_images(row)

    def __call__(self, images: np.ndarray, metadata: list[Row]) -> Scored:
        """Score uint8 images [B, H, W, 3], rows one by one; rows of one source share its faces."""
        check_images(images, metadata)
        keys = [_key(row) if has_sources(row) else None for row in metadata]
        rows = {key: row for key, row in zip(keys, metadata, strict=True) if key is not None}
        known = dict(zip(rows, self._pool.map(self._source, rows.values()), strict=True))
        todo = [
            (image, known[key] if key else None) for image, key in zip(images, keys, strict=True)
        ]
        results = list(self._pool.map(lambda one: self._one(*one), todo))
        if not self._told and any(status == MISSING for _, status, _ in results):
            self._told = True
            log.warning("face: rows whose source has no face to judge are missing")
        return Scored(
            np.array([value for value, _, _ in results], np.float32),
            np.array([status for _, status, _ in results], np.int8),
            {i: reason for i, (_, _, reason) in enumerate(results) if reason},
        )

    def explain(self, image_HW3: np.ndarray, row: Row) -> dict[str, Any]:
        """Faces found and their cosines [S, R], for people to read; ValueError as scoring fails."""
        judged, small = self._faces(self._pictures(row))
        vectors, faces = self._result(image_HW3)
        return {
            "source_faces": len(judged),
            "too_small": small,
            "result_faces": [face.box.tolist() for face in faces],
            "cosines": (judged @ vectors.T).tolist() if len(judged) and len(vectors) else [],
        }

    def close(self) -> None:
        """Stop the workers."""
        self._pool.shutdown()

    def _pictures(self, row: Row) -> Sequence[np.ndarray]:
        pictures = condition_images(row)
        return pictures if self.settings.sources == "all" else pictures[-1:]

    def _source(self, row: Row) -> tuple[np.ndarray, int] | str:
        try:
            return self._faces(self._pictures(row))
        except Exception as error:  # whatever a model raises is these rows' failure alone
            return f"the source's faces: {error}"

    def _faces(self, pictures: Sequence[np.ndarray]) -> tuple[np.ndarray, int]:
        """Embeddings float64 [S, D] of the faces to be judged, and how many are too small."""
        found = [(picture, face) for picture in pictures for face in self.model.detect(picture)]
        large = [(p, face) for p, face in found if face.side >= self.settings.min_face]
        vectors = [self.model.embed(picture, face) for picture, face in large]
        return np.array(vectors, np.float64), len(found) - len(large)

    def _result(self, image: np.ndarray) -> tuple[np.ndarray, list[Face]]:
        faces = [f for f in self.model.detect(image) if f.side >= self.settings.min_face / 2]
        return np.array([self.model.embed(image, f) for f in faces], np.float64), faces

    def _one(
        self, image: np.ndarray, source: tuple[np.ndarray, int] | str | None
    ) -> tuple[float, int, str]:
        if isinstance(source, str):
            return 0.0, FAILED, source
        if source is None or not len(source[0]):
            return 0.0, MISSING, ""
        judged, small = source
        try:
            vectors, faces = self._result(image)
        except Exception as error:  # as in `_source`
            return 0.0, FAILED, f"the result's faces: {error}"
        if not faces:
            return 0.0, SCORED, ""
        s = self.settings
        value = (judged @ vectors.T - s.different) / (s.same - s.different)
        large = np.array([face.side >= s.min_face for face in faces])
        return identity(value.clip(0.0, 1.0), large, small), SCORED, ""


def identity(value_SR: np.ndarray, large_R: np.ndarray, small: int) -> float:
    """The score of values in [0, 1]; large_R: bool, faces that count where they are too many."""
    rows, columns = linear_sum_assignment(-value_SR)
    over = int(large_R.sum() - large_R[columns].sum())
    return float(value_SR[rows, columns].sum() / (len(value_SR) + max(0, over - small)))


def _key(row: Row) -> str:
    """Names what the row's condition images are."""
    digest = hashlib.sha256()
    try:
        for image in condition_images(row):
            digest.update(repr(image.shape).encode() + image.tobytes())
    except ValueError as error:
        return str(error)
    return digest.hexdigest()


def _model(settings: Settings, device: str) -> FaceModel:
    if settings.engine == "face_recognition":
        from qirl_fast.rewards.face_library import LibraryFaces

        return LibraryFaces()
    if settings.detector is None or settings.embedder is None:
        raise ValueError(
            "the face judge wants the ONNX files of a detector and an embedder: name both (which "
            "ones there are, and their licences: docs/judges.md), or set engine: face_recognition"
        )
    from qirl_fast.rewards.face_onnx import OnnxFaces

    return OnnxFaces(settings, device)
