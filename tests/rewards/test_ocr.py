"""The OCR judge on text drawn with PIL, read by the real PP-OCR models; the words alone."""

import re
import socket
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from pydantic import ValidationError

from qirl_fast.rewards import ocr
from qirl_fast.rewards.judge import FAILED, MISSING, SCORED
from qirl_fast.rewards.ocr import Judge, Settings, accuracy, levenshtein, normalise, wanted_text

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def drawn(*lines, size=512, points=48, left=24):
    """Black text on grey, one line below the other: uint8 [size, size, 3]."""
    image = Image.new("RGB", (size, size), (222, 226, 230))
    draw, font = ImageDraw.Draw(image), ImageFont.truetype(str(FONT), points)
    for i, line in enumerate(lines):
        draw.text((left, 60 + i * points * 1.6), line, (20, 24, 30), font)
    return np.array(image)


def quoting(text):
    return {"prompt": f'A shop sign that says "{text}", at dusk'}


@pytest.fixture(scope="module")
def judge():
    with_two = Judge(Settings(kind="ocr"))
    yield with_two
    with_two.close()


def test_misspelt_text_scores_lower_in_order(judge):
    images = np.stack([drawn(t) for t in ("Hello World", "Hello Wrold", "Holla Warld", "Pony")])
    rows = [quoting("Hello World")] * 4
    result = judge(images, rows)
    assert result.status.tolist() == [SCORED] * 4 and result.values.dtype == np.float32
    assert result.values[0] == 1.0 and result.values[1] == pytest.approx(0.8)
    assert (np.diff(result.values) < -0.05).all(), result.values

    alone = judge(images[1:2], rows[1:2])
    assert alone.values[0] == result.values[1]


def test_several_lines_in_reading_order_and_blank_images(judge):
    lines = drawn("Spring Collection", "2024")
    blank = np.full((512, 512, 3), 200, np.uint8)
    text = "Spring Collection 2024"
    result = judge(np.stack([lines, blank]), [{"prompt": "a poster", "text": text}] * 2)
    assert result.values.tolist() == [1.0, 0.0] and result.status.tolist() == [SCORED, SCORED]
    assert judge.explain(lines, {"ocr_text": "spring  COLLECTION\n2025"}) == {
        "wanted": "spring  COLLECTION\n2025",
        "found": text,
        "score": pytest.approx(1 - 1 / 20),
    }


def test_nothing_is_downloaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"a connection was tried: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    offline = Judge(Settings(kind="ocr", workers=1), device="cuda")
    assert offline.read(drawn("Exit")) == "Exit"
    offline.close()


def test_a_row_the_engine_cannot_read_has_failed_alone(judge, monkeypatch):
    read = Judge.read

    def breaks_on_black(self, image):
        if not image.any():
            raise RuntimeError("broken model")
        return read(self, image)

    monkeypatch.setattr(Judge, "read", breaks_on_black)
    images = np.stack([np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)])
    result = judge(images, [quoting("x")] * 2)
    assert result.status.tolist() == [FAILED, SCORED]
    assert list(result.reasons) == [0] and "RuntimeError('broken model')" in result.reasons[0]
    # the engine that raised is back in the queue
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(Exception, match="ndim"):
            judge.read(np.zeros((2, 2, 2, 2), np.uint8))
    assert judge._engines.qsize() == 2


def test_a_row_without_text_is_refused_before_and_missing_after(judge):
    row = {"prompt": "a red circle"}
    with pytest.raises(ValueError, match="give the row a 'text', or put the text in double quotes"):
        judge.check_row(row)
    result = judge(np.zeros((1, 64, 64, 3), np.uint8), [row])
    assert result.status.tolist() == [MISSING] and not result.reasons


def test_no_images(judge):
    result = judge(np.zeros((0, 64, 64, 3), np.uint8), [])
    assert result.values.shape == result.status.shape == (0,)


def test_bad_images(judge):
    with pytest.raises(ValueError, match="wanted a numpy uint8 array"):
        judge(np.zeros((1, 64, 64, 3), np.float32), [quoting("x")])
    with pytest.raises(ValueError, match="1 images came with 2"):
        judge(np.zeros((1, 64, 64, 3), np.uint8), [quoting("x")] * 2)


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ({"prompt": 'a sign "One" and "Two"'}, "One"),
        ({"prompt": "a sign \u201cOne\u201d"}, "One"),
        ({"prompt": 'a \u201cZero\u201d sign "One"'}, "One"),
        ({"prompt": 'a sign "One"', "text": "Two"}, "Two"),
        ({"prompt": 'a sign "One"', "ocr_text": "Two"}, "Two"),
    ],
)
def test_where_the_wanted_text_stands(row, want):
    assert wanted_text(row) == want


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({}, "no text to look for"),
        ({"prompt": None}, "no text to look for"),
        ({"prompt": 'a board 12" wide'}, "no text to look for"),
        ({"prompt": 'a sign " "'}, "the quoted text is ' '"),
        ({"prompt": 'a sign "One"', "text": ""}, "'text' is ''"),
        ({"prompt": 'a sign "One"', "text": 7}, "'text' is 7"),
        ({"prompt": 'a sign "One"', "ocr_text": ["One"]}, r"'ocr_text' is \['One'\]"),
    ],
)
def test_rows_without_usable_text(row, words):
    with pytest.raises(ValueError, match=words):
        wanted_text(row)


def slow_distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(
        slow_distance(a[1:], b) + 1,
        slow_distance(a, b[1:]) + 1,
        slow_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


def test_levenshtein_against_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(120):
        a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 6))) for _ in range(2))
        assert levenshtein(a, b) == levenshtein(b, a) == slow_distance(a, b), (a, b)
    assert levenshtein("kitten", "sitting") == 3


@pytest.mark.parametrize(
    ("found", "wanted", "free", "counted"),
    [
        ("", "exit", 0.0, 0.0),
        ("EXIT", "exit", 1.0, 1.0),
        ("now exit here", "exit", 1.0, 0.0),
        ("exit!", "exit", 1.0, 0.75),
        ("exot", "exit", 0.75, 0.75),
        ("a very long other text", "exit", 0.0, 0.0),
        ("Honk If You're", "honk if you\u2019re", 1.0, 1.0),
        ("Gate 131/2", "Gate 13\u00bd", 1.0, 1.0),
        ("\uff33\uff2f\uff30\uff01", "SOP!", 1.0, 1.0),
        ("H\u2082O", "H2O", 1.0, 1.0),
    ],
)
def test_accuracy(found, wanted, free, counted):
    assert accuracy(found, wanted) == pytest.approx(free)
    assert accuracy(found, wanted, "counted") == pytest.approx(counted)


def test_accuracy_is_flow_grpos_on_plain_text():
    """Without spaces, lower case, contained -> 1, else 1 - distance / length, 0 at least."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        w = "".join(rng.choice(list("aB c"), rng.integers(1, 8))) + "a"
        f = "".join(rng.choice(list("aB c"), rng.integers(0, 12)))
        a, b = f.replace(" ", "").lower(), w.replace(" ", "").lower()
        want = 1.0 if b in a else 1 - min(levenshtein(a, b), len(b)) / len(b)
        assert accuracy(f, w) == pytest.approx(want)


def test_reading_order():
    def box(left, top, width=40, height=20):
        right, bottom = left + width, top + height
        return np.array([[left, top], [right, top], [right, bottom], [left, bottom]], np.float32)

    pieces = [
        (box(10, 100), "third"),
        (box(200, 12, height=14), "second"),  # smaller and lower, yet on the first line
        (box(10, 0, height=40), "FIRST"),
        (box(300, 104), "fifth"),
        (box(90, 97), "fourth"),
    ]
    assert ocr.in_reading_order(pieces) == "FIRST second third fourth fifth"
    assert ocr.in_reading_order([]) == ""


def test_flow_grpos_own_prompts_are_understood():
    prompts = [
        'An engraved ring with the inscription "Forever Yours" in script',
        'A door marked "Floor 13\u00bd" beside another "Exit"',
    ]
    assert [wanted_text({"prompt": p}) for p in prompts] == [p.split('"')[1] for p in prompts]
    assert normalise("  Floor\t13\u00bd\n") == "floor131/2"


def test_settings():
    assert Settings.model_validate({"kind": "ocr"}).extra == "free"
    for bad in ({}, {"kind": "ocr", "workers": 0}, {"kind": "ocr", "min_confidence": 1.5}):
        with pytest.raises(ValidationError):
            Settings.model_validate(bad)
    assert all(field.description for field in Settings.model_fields.values())


def test_a_model_that_is_not_there_or_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("none.onnx is no file")):
        Judge(Settings(kind="ocr", detector=str(tmp_path / "none.onnx")))
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    with pytest.raises(ValueError, match=r"cannot be used.*recogniser .*text\.onnx"):
        Judge(Settings(kind="ocr", workers=1, recogniser=str(text)))


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(ocr, "find_spec", lambda name: None if name == "onnxruntime" else True)
    with pytest.raises(ImportError, match=r"wants onnxruntime: pip install 'qirl-fast\[ocr\]'"):
        Judge(Settings(kind="ocr"))
