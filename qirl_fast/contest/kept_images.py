"""Drawn images on disk: PNG files with their SHA-256, chunk by chunk, whole or not at all.

<folder>/<key of a chunk>-<row>.png     the images, in order
         <key of a chunk>.json          {"files": {name: sha256}}, written after them

A chunk is what one forward draws: its key says all that decides its pixels beside the model's
fingerprint, which names the folder. A chunk whose files are missing, cut short or changed in a bit
is not given back: it is to be drawn again, and `damaged` says why. One without its .json was being
written when the process ended.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from qirl_fast.whole import write_text


class KeptImages:
    """The chunks in one folder. damaged: what was found wrong, a line each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.damaged: list[str] = []

    def sound(self, key: str, rows: int) -> bool:
        """Whether a chunk is there, every file as it was written."""
        index = self.folder / f"{key}.json"
        if not index.exists():
            return False
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["files"]
            if list(files) != [self.file(key, i).name for i in range(rows)]:
                raise ValueError(f"{index} names {len(files)} images; wanted {rows}")
            for name, sha256 in files.items():
                _require(self.folder / name, sha256)
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = error if str(error).startswith(str(self.folder)) else f"{index}: {error!r}"
            self.damaged.append(f"{what}; its chunk of {rows} images is drawn again")
            return False
        return True

    def get(self, key: str, rows: int) -> np.ndarray:
        """uint8 [rows, H, W, 3] of a sound chunk."""
        found = []
        for i in range(rows):
            with Image.open(self.file(key, i)) as image:
                found.append(np.array(image.convert("RGB")))
        return np.stack(found)

    def put(self, key: str, images: np.ndarray) -> None:
        """Keep a chunk, uint8 [rows, H, W, 3]."""
        self.folder.mkdir(parents=True, exist_ok=True)
        files = {}
        for i, image in enumerate(images):
            data = io.BytesIO()
            Image.fromarray(image).save(data, "PNG", compress_level=1)
            path = self.file(key, i)
            beside = path.with_name(f".{path.name}.tmp")
            beside.write_bytes(data.getvalue())
            beside.replace(path)
            files[path.name] = hashlib.sha256(data.getvalue()).hexdigest()
        write_text(self.folder / f"{key}.json", json.dumps({"files": files}, indent=0) + "\n")

    def file(self, key: str, row: int) -> Path:
        """Where image number `row` of a chunk is kept."""
        return self.folder / f"{key}-{row:03d}.png"

    def note(self, key: str, what: str) -> Path:
        """Where what a judge said of a chunk is kept; `what`: a hash of judge and images."""
        return self.folder / f"{key}.{what[:16]}.json"


def _require(path: Path, sha256: str) -> None:
    """ValueError unless the file has this SHA-256."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ValueError(f"{path} is damaged (SHA-256 differs)")
