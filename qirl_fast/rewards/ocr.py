"""How well the text that a prompt asks for can be read in the image, in [0, 1]: `kind: ocr`.

The image is read with the PP-OCR models inside the rapidocr wheel (pip install 'qirl-fast[ocr]'),
on the CPU and without any download. With f the text found and w the text wanted, both normalised,

    score = 1 - min(D, |w|) / |w|,  D = 0 if w is a part of f (extra: free), else Levenshtein(f, w)

which is flow_grpo's OCR reward (flow_grpo/ocr.py). Where it differs: an image the engine cannot
process has failed instead of scoring 0; normalising (see `normalise`) also folds Unicode forms and
curly quotes; lines are joined in reading order, words on one line from left to right.

The wanted text is the row's "text" or "ocr_text", else what stands in the first pair of double
quotes of its "prompt", straight ones before curly ones (flow_grpo's convention). `check_row` raises
for a row without any; if such a row comes to be scored all the same, it is missing. An image in
which nothing legible is found scores 0: it was judged.
"""

import queue
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from qirl_fast.rewards.judge import FAILED, MISSING, SCORED, Row, Scored
from qirl_fast.rewards.segment import check_images
from qirl_fast.section import Count, Level, Section, Text

TEXT_KEYS = ("text", "ocr_text")
QUOTED = (re.compile(r'"([^"]*)"'), re.compile("\u201c([^\u201d]*)\u201d"))
# What NFKC leaves apart though it is drawn alike: curly quotes, the slash of a fraction.
ALIKE = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2044": "/"})


class Settings(Section):
    """A judge of legible text."""

    kind: Literal["ocr"] = Field(description="text accuracy by PP-OCR")
    extra: Literal["free", "counted"] = Field(
        default="free",
        description="text beside the wanted one: free if the wanted one is there whole, as in "
        "flow_grpo, or always counted as errors",
    )
    min_confidence: Level = Field(
        default=0.5, description="lines the recogniser is less sure of count as not legible"
    )
    workers: Count = Field(default=2, description="images read at a time, one CPU thread each")
    detector: Text | None = Field(
        default=None, description="ONNX file of another PP-OCR text detector; null: the wheel's"
    )
    recogniser: Text | None = Field(
        default=None, description="ONNX file of another PP-OCR recogniser; null: the wheel's"
    )


class Judge:
    """The judge of `Settings`. Each worker has an engine of its own, as an engine keeps state.

    `device` is not used: the engines run on the CPU. Construction raises ImportError without
    rapidocr or onnxruntime, FileNotFoundError without a model file, and ValueError if the models
    cannot read.
    """

    masks = True

    def __init__(self, settings: Settings, device: str = "cpu") -> None:
        self.settings = settings
        self._engines: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(settings.workers):
            self._engines.put(_engine(settings))
        self._pool = ThreadPoolExecutor(settings.workers, thread_name_prefix="ocr")
        self._try_out()

    def check_row(self, row: Row) -> None:
        """ValueError, with the reason, for a row that names no text to look for."""
        wanted_text(row)

    def __call__(self, images: np.ndarray, metadata: list[Row]) -> Scored:
        """Score uint8 images [B, H, W, 3], rows one by one."""
        check_images(images, metadata)
        results = list(self._pool.map(self._one, images, metadata))
        return Scored(
            np.array([value for value, _, _ in results], np.float32),
            np.array([status for _, status, _ in results], np.int8),
            {i: reason for i, (_, _, reason) in enumerate(results) if reason},
        )

    def explain(self, image_HW3: np.ndarray, row: Row) -> dict[str, Any]:
        """The wanted and the found text of one image and its score, for people to read."""
        wanted, found = wanted_text(row), self.read(image_HW3)
        return {
            "wanted": wanted,
            "found": found,
            "score": accuracy(found, wanted, self.settings.extra),
        }

    def read(self, image_HW3: np.ndarray) -> str:
        """The text of one uint8 image, lines from the top joined by spaces; "" if there is none."""
        engine = self._engines.get()
        try:
            result = engine(np.ascontiguousarray(image_HW3[..., ::-1]))
        finally:
            self._engines.put(engine)
        if getattr(result, "txts", None) is None:
            return ""
        return in_reading_order(list(zip(result.boxes, result.txts, strict=True)))

    def close(self) -> None:
        """Stop the workers."""
        self._pool.shutdown()

    def _try_out(self) -> None:
        """Read one small image, as the engine opens its models only then."""
        from PIL import Image, ImageDraw, ImageFont

        image = Image.new("RGB", (192, 64), "white")
        ImageDraw.Draw(image).text((16, 8), "OCR", "black", ImageFont.load_default(40))
        try:
            self.read(np.asarray(image))
        except Exception as error:
            self.close()
            raise ValueError(
                f"the OCR models cannot be used ({error!r}): detector "
                f"{self.settings.detector or 'of the wheel'}, recogniser "
                f"{self.settings.recogniser or 'of the wheel'}"
            ) from error

    def _one(self, image_HW3: np.ndarray, row: Row) -> tuple[float, int, str]:
        try:
            wanted = wanted_text(row)
        except ValueError:
            return 0.0, MISSING, ""
        try:
            found = self.read(image_HW3)
        except Exception as error:  # whatever the engine raises is this image's failure alone
            return 0.0, FAILED, f"the OCR engine failed: {error!r}"
        return accuracy(found, wanted, self.settings.extra), SCORED, ""


def wanted_text(row: Row) -> str:
    """The text a row asks for, as it stands; ValueError where there is none."""
    for key in TEXT_KEYS:
        if key in row:
            return _usable(row[key], repr(key), row)
    prompt = row.get("prompt")
    for quoted in QUOTED:
        if isinstance(prompt, str) and (match := quoted.search(prompt)):
            return _usable(match[1], "the quoted text", row)
    raise ValueError(
        "the OCR judge finds no text to look for: give the row a 'text', or put the text in "
        f"double quotes in its prompt: {row!r}"
    )


def _usable(text: Any, where: str, row: Row) -> str:
    if not isinstance(text, str) or not normalise(text):
        raise ValueError(f"{where} is {text!r}; the OCR judge wants some text there: {row!r}")
    return text


def normalise(text: str) -> str:
    """NFKC, curly quotes made straight, all whitespace removed, lower case."""
    folded = unicodedata.normalize("NFKC", text).translate(ALIKE)
    return "".join(folded.split()).lower()


def accuracy(found: str, wanted: str, extra: str = "free") -> float:
    """The score of a found text, in [0, 1]; both are normalised here."""
    f, w = normalise(found), normalise(wanted)
    if extra == "free" and w in f:
        return 1.0
    return 1.0 - min(levenshtein(f, w), len(w)) / len(w)


def levenshtein(a: str, b: str) -> int:
    """The least number of characters to insert, delete or replace that turns `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, (diagonal, up) in enumerate(pairwise(above)):
            row.append(min(up + 1, row[j] + 1, diagonal + (x != b[j])))
    return row[-1]


def in_reading_order(pieces: list[tuple[np.ndarray, str]]) -> str:
    """Texts of boxes [4, 2] (x, y) joined by spaces: lines from the top, words from the left.

    A piece belongs to a line if its middle lies within the height of the line's first piece.
    """
    spans = [(box[:, 1].min(), box[:, 1].max(), box[:, 0].min(), text) for box, text in pieces]
    lines: list[tuple[float, float, list[tuple[float, str]]]] = []
    for top, bottom, left, text in sorted(spans):
        middle = (top + bottom) / 2
        line = next((line for line in lines if line[0] <= middle <= line[1]), None)
        if line is None:
            line = (float(top), float(bottom), [])
            lines.append(line)
        line[2].append((float(left), text))
    return " ".join(text for _, _, words in lines for _, text in sorted(words))


def _engine(settings: Settings) -> Any:
    missing = [name for name in ("rapidocr", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"the OCR judge wants {' and '.join(missing)}: pip install 'qirl-fast[ocr]'"
        )
    import rapidocr

    models = Path(rapidocr.__file__).parent / "models"
    return rapidocr.RapidOCR(
        params={
            "Global.use_cls": False,
            "Global.text_score": settings.min_confidence,
            "Global.log_level": "error",
            "Det.model_path": _model(settings.detector, models, "det"),
            "Rec.model_path": _model(settings.recogniser, models, "rec"),
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )


def _model(given: str | None, models: Path, part: str) -> str:
    """The model file, named so that rapidocr never looks for one to download."""
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(f"{given} is no file; wanted the ONNX file of a PP-OCR {part}")
        return given
    found = sorted(models.glob(f"*_{part}_*.onnx"))
    if len(found) != 1:
        key = {"det": "detector", "rec": "recogniser"}[part]
        raise FileNotFoundError(
            f"{models} holds {len(found)} PP-OCR {part} models, wanted one: install rapidocr 3.10 "
            f"again, or name the file in the judge's {key!r}"
        )
    return str(found[0])
