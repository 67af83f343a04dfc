"""Faces by the `face_recognition` library (dlib): found by HOG, embedded in 128 dimensions.

It aligns by itself, so its faces have no landmarks here, and it gives no score of detection: 1. Its
vectors are made to be compared by distance (below 0.6: one person) and, brought to length 1, are
all near each other, so that `different` and `same` have to be set: see docs/judges.md. dlib's
models are not safe to share between threads: faces are found one picture at a time.
"""

import threading
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import ImageFile

from qirl_fast.rewards.face import Face

INSTALL = "pip install 'qirl-fast[face-recognition]' (it compiles dlib: a C++ compiler and cmake)"


class LibraryFaces:
    """The `FaceModel` of the library; ImportError, with the command, without it or its models."""

    def __init__(self) -> None:
        missing = [n for n in ("face_recognition", "face_recognition_models") if not find_spec(n)]
        if missing:
            raise ImportError(f"engine: face_recognition wants {' and '.join(missing)}: {INSTALL}")
        truncated = ImageFile.LOAD_TRUNCATED_IMAGES
        try:
            import face_recognition
        except SystemExit as error:  # what the library does where its models cannot be imported
            raise ImportError(
                "face_recognition cannot import its models, which want pkg_resources: "
                "pip install 'setuptools<81'"
            ) from error
        finally:  # it tells PIL to fill torn images with grey, in the whole process
            ImageFile.LOAD_TRUNCATED_IMAGES = truncated
        self._library: Any = face_recognition
        self._lock = threading.Lock()

    def detect(self, image_HW3: np.ndarray) -> list[Face]:
        """Faces of a uint8 image in the library's order; score 1, no points."""
        with self._lock:
            found = self._library.face_locations(np.ascontiguousarray(image_HW3))
        return [
            Face(np.array([left, top, right, bottom], np.float64), None, 1.0)
            for top, right, bottom, left in found
        ]

    def embed(self, image_HW3: np.ndarray, face: Face) -> np.ndarray:
        """Unit vector float64 [128]; ValueError where the library gives none."""
        left, top, right, bottom = (round(float(x)) for x in face.box)
        with self._lock:
            found = self._library.face_encodings(
                np.ascontiguousarray(image_HW3), known_face_locations=[(top, right, bottom, left)]
            )
        vector = np.asarray(found[0] if found else [], np.float64)
        length = np.linalg.norm(vector)
        if not np.isfinite(length) or length == 0:
            raise ValueError(f"face_recognition gave no vector for the face at {face.box.tolist()}")
        return vector / length
