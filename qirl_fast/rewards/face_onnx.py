"""Faces by ONNX files the user names: a detector with five key points, and an embedder.

Detectors, told apart by their outputs, S being the input's side and (x, y) a cell of a stride's
grid, row by row:
- SCRFD as insightface exports it with key points (det_500m, det_2.5g, det_10g: `*_bnkps`): nine
  outputs, score, box and points of strides 8, 16, 32, A anchors a cell, in units of the stride.
  The input is RGB, (pixel - 127.5) / 128. Box = stride (x - l, y - t, x + r, y + b).
- YuNet of the OpenCV zoo: twelve named outputs cls, obj, bbox, kps. The input is BGR, 0..255.
  Score = sqrt(cls obj), middle = stride (x + dx, y + dy), size = stride exp(w, h).
The picture is scaled to fit S x S and put in its upper left corner, black elsewhere. Boxes that
overlap a better one by more than IOU are dropped. insightface scales with OpenCV, this with PIL,
which smooths when it makes smaller; scores differ a little for that.

The embedder takes faces float32 [1, 3, 112, 112] aligned by `face_align.py`, (pixel - mean) / std,
and gives one vector, which is brought to length 1. Faces are not flipped and averaged. One face
goes through at a time, so that a face's vector never depends on others.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qirl_fast.rewards.face import Face, Settings
from qirl_fast.rewards.face_align import SIDE, aligned

STRIDES = (8, 16, 32)
IOU = 0.4
YUNET = [f"{part}_{stride}" for part in ("cls", "obj", "bbox", "kps") for stride in STRIDES]
WANTED = (
    "wanted SCRFD with key points (nine outputs: score [N, 1], box [N, 4] and points [N, 10] of "
    "the strides 8, 16, 32; insightface's det_*.onnx), or YuNet's twelve (cls_8 ... kps_32)"
)

Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # scores [N], boxes [N, 4], points [N, 5, 2]


class OnnxFaces:
    """The `FaceModel` of two files. device: "cuda" or "cuda:N" says which GPU, for that provider.

    Both files are run once: ImportError, FileNotFoundError or ValueError where that fails.
    """

    def __init__(self, settings: Settings, device: str = "cpu") -> None:
        self.settings = settings
        self.detector = _Session(settings.detector, "detector", settings.provider, device)
        self.side = self._side()
        blank = np.zeros((1, 3, self.side, self.side), np.float32)
        self._decode = self._decoder(self.detector(blank))
        self.embedder = _Session(settings.embedder, "embedder", settings.provider, device)
        self._check_embedder()

    def detect(self, image_HW3: np.ndarray) -> list[Face]:
        """Faces of a uint8 image, the surest first; ValueError where the model gives NaN."""
        height, width = image_HW3.shape[:2]
        scale = self.side / max(height, width)
        size = max(1, int(width * scale)), max(1, int(height * scale))
        canvas = np.zeros((self.side, self.side, 3), np.float32)
        small = Image.fromarray(image_HW3).resize(size, Image.Resampling.BILINEAR)
        canvas[: size[1], : size[0]] = np.asarray(small)
        scores, boxes, points = self._decode(self.detector(self._prepare(canvas)))
        for name, x in (("scores", scores), ("boxes", boxes), ("points", points)):
            if not np.isfinite(x).all():
                raise ValueError(f"{self.detector.path} gave {name} that are not finite")
        sure = scores >= self.settings.min_score
        scores, boxes, points = scores[sure], boxes[sure], points[sure]
        ratio = np.array([width / size[0], height / size[1]])
        return [
            Face(boxes[i] * np.tile(ratio, 2), points[i] * ratio, float(scores[i]))
            for i in best_of_each(boxes, scores)
        ]

    def embed(self, image_HW3: np.ndarray, face: Face) -> np.ndarray:
        """Unit vector float64 [D]; ValueError for landmarks or a vector that cannot be used."""
        if face.points is None:
            raise ValueError("a face without landmarks cannot be aligned; wanted five points")
        crop = aligned(image_HW3, face.points)
        if self.settings.channels == "bgr":
            crop = crop[..., ::-1]
        pixels = (crop - np.float32(self.settings.mean)) / np.float32(self.settings.std)
        vector = self.embedder(_planes(pixels))[0].reshape(-1).astype(np.float64)
        length = np.linalg.norm(vector)
        if not np.isfinite(length) or length == 0:
            raise ValueError(f"{self.embedder.path} gave a vector of length {length}")
        return vector / length

    def _side(self) -> int:
        height, width = self.detector.shape[2:]
        if isinstance(height, int) or isinstance(width, int):
            if height != width:
                raise ValueError(
                    f"{self.detector.path} takes pictures of {height} x {width}; wanted a square, "
                    "or sizes left open"
                )
            side = int(height)
        else:
            side = self.settings.detect_side
        if side % STRIDES[-1]:
            raise ValueError(
                f"the detector sees {side} pixels of a side; wanted a multiple of 32 (detect_side)"
            )
        return side

    def _decoder(self, outputs: list[np.ndarray]) -> Callable[[list[np.ndarray]], Found]:
        """How these outputs are read, from those of a blank picture."""
        names, cells = self.detector.outputs, [(self.side // s) ** 2 for s in STRIDES]
        shapes = [list(x.shape) for x in outputs]
        if sorted(names) == sorted(YUNET):
            order = [names.index(name) for name in YUNET]
            widths = [1] * 6 + [4] * 3 + [10] * 3
            if all(outputs[o].size == cells[i % 3] * widths[i] for i, o in enumerate(order)):
                self._prepare = lambda canvas: _planes(canvas[..., ::-1])
                return lambda found: _yunet([found[o] for o in order], self.side)
        elif len(outputs) == 9:
            widths = [1] * 3 + [4] * 3 + [10] * 3
            anchors = outputs[0].size // cells[0]
            want = [anchors * cells[i % 3] * n for i, n in enumerate(widths)]
            ends = [x.shape[-1] for x in outputs]
            if anchors and [x.size for x in outputs] == want and ends == widths:
                self._prepare = lambda canvas: _planes((canvas - 127.5) / 128)
                return lambda found: _scrfd(found, self.side, anchors)
        raise ValueError(
            f"{self.detector.path} is no detector this judge reads: for a picture of {self.side} x "
            f"{self.side} its outputs {names} have shapes {shapes}; {WANTED}"
        )

    def _check_embedder(self) -> None:
        shape = self.embedder.shape
        if any(isinstance(n, int) and n != SIDE for n in shape[2:]):
            raise ValueError(
                f"{self.embedder.path} takes pictures of {shape[2]} x {shape[3]}; wanted an "
                f"embedder of aligned faces, {SIDE} x {SIDE}"
            )
        found = self.embedder(np.zeros((1, 3, SIDE, SIDE), np.float32))
        if len(found) != 1 or found[0].ndim != 2 or len(found[0]) != 1 or found[0].shape[1] < 2:
            raise ValueError(
                f"{self.embedder.path} has outputs {self.embedder.outputs} of shapes "
                f"{[list(x.shape) for x in found]}; wanted one vector [1, D] a face"
            )


class _Session:
    """A file that takes one picture [1, 3, H, W]; `shape` is that input's, as the file has it."""

    def __init__(self, given: str | None, part: str, provider: str, device: str) -> None:
        if find_spec("onnxruntime") is None:
            raise ImportError("the face judge wants onnxruntime: pip install 'qirl-fast[face]'")
        if given is None or not Path(given).is_file():
            raise FileNotFoundError(f"{given} is no file; wanted the ONNX file of a face {part}")
        import onnxruntime

        self.path, options = given, onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                given, options, providers=_providers(onnxruntime, provider, device)
            )
        except ImportError:
            raise
        except Exception as error:  # onnxruntime has a class for each reason
            raise ValueError(f"{given} is no ONNX file of a face {part}: {error}") from error
        used = self._session.get_providers()[0]
        if provider == "cuda" and used != "CUDAExecutionProvider":
            raise ValueError(
                f"onnxruntime could not start CUDA for {given} and took {used}: mend its CUDA and "
                "cuDNN, or set provider: cpu"
            )
        inputs = self._session.get_inputs()
        shapes = [list(x.shape) for x in inputs]
        self.shape: list[Any] = shapes[0]
        form = len(inputs) == 1 and len(self.shape) == 4 and inputs[0].type == "tensor(float)"
        if not form or not all(
            n == m or not isinstance(n, int) for n, m in zip(self.shape, (1, 3), strict=False)
        ):
            raise ValueError(
                f"{given} takes {shapes} of {[x.type for x in inputs]}; wanted one picture float32 "
                f"[1, 3, height, width] for a face {part}"
            )
        self.input = inputs[0].name
        self.outputs = [x.name for x in self._session.get_outputs()]

    def __call__(self, pixels: np.ndarray) -> list[np.ndarray]:
        try:
            return self._session.run(None, {self.input: pixels})
        except Exception as error:
            raise ValueError(
                f"{self.path} cannot be run on {list(pixels.shape)}: {error}"
            ) from error


def _providers(onnxruntime: Any, provider: str, device: str) -> list[Any]:
    if provider == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise ImportError(
            "provider: cuda wants onnxruntime for GPUs: pip uninstall onnxruntime; pip install "
            "onnxruntime-gpu (or set provider: cpu)"
        )
    number = int(device.partition(":")[2] or 0)
    return [("CUDAExecutionProvider", {"device_id": number}), "CPUExecutionProvider"]


def _planes(x_HW3: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x_HW3.transpose(2, 0, 1)[None], np.float32)


def _grid(side: int, stride: int, anchors: int) -> np.ndarray:
    """Cells (x, y) of a stride, row by row, each `anchors` times: float [N, 2]."""
    n = side // stride
    y, x = np.mgrid[:n, :n].reshape(2, -1).astype(np.float64)
    return np.stack([x, y], 1).repeat(anchors, 0)


def _scrfd(found: list[np.ndarray], side: int, anchors: int) -> Found:
    scores, boxes, points = [], [], []
    for i, stride in enumerate(STRIDES):
        cells = _grid(side, stride, anchors)
        edges = found[3 + i].reshape(-1, 4)
        scores.append(found[i].reshape(-1))
        boxes.append(stride * np.hstack([cells - edges[:, :2], cells + edges[:, 2:]]))
        points.append(stride * (cells[:, None] + found[6 + i].reshape(-1, 5, 2)))
    return np.concatenate(scores), np.concatenate(boxes), np.concatenate(points)


def _yunet(found: list[np.ndarray], side: int) -> Found:
    scores, boxes, points = [], [], []
    for i, stride in enumerate(STRIDES):
        cells = _grid(side, stride, 1)
        cls, obj = (found[k + i].reshape(-1).clip(0, 1) for k in (0, 3))
        box = found[6 + i].reshape(-1, 4).astype(np.float64)
        middle, half = cells + box[:, :2], np.exp(box[:, 2:]) / 2
        scores.append(np.sqrt(cls * obj))
        boxes.append(stride * np.hstack([middle - half, middle + half]))
        points.append(stride * (cells[:, None] + found[9 + i].reshape(-1, 5, 2)))
    return np.concatenate(scores), np.concatenate(boxes), np.concatenate(points)


def best_of_each(boxes: np.ndarray, scores: np.ndarray) -> list[int]:
    """Indices, the best score first, of boxes [N, 4] that no better one overlaps by over IOU."""
    left = np.argsort(-scores, kind="stable")
    area = (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1)
    kept: list[int] = []
    while left.size:
        best, rest = int(left[0]), left[1:]
        kept.append(best)
        low = np.maximum(boxes[best, :2], boxes[rest, :2])
        high = np.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = (high - low).clip(0).prod(1)
        # a whole union of 0 is two boxes without area: apart
        union = np.maximum(area[best] + area[rest] - shared, 1e-9)
        left = rest[shared / union <= IOU]
    return kept
