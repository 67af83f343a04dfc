"""The protocol: what goes in comes out, and bytes of strangers raise WireError, nothing else."""

import contextlib
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qirl_fast.rewards import wire, wire_answer
from qirl_fast.rewards.judge import FAILED, MISSING, SCORED, SOURCES, Scored
from qirl_fast.rewards.wire import Limits, TooLarge, WireError

RNG = np.random.default_rng(0)
LIMITS = Limits()


def image(height=4, width=6):
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


IMAGES = [image(), image(9, 2), image(1, 1)]
ROWS = [
    {"prompt": "a cat", "include": [{"class": "cat", "count": 1, "big": None, "p": 0.1}]},
    {"prompt": "caf\xe9 \u732b \U0001f600", "tag": "edit", SOURCES: [image(3, 3), image(2, 8)]},
    {"prompt": "", SOURCES: []},
]
IDS = ["0", "1", "2"]


def body(**changes):
    """A valid request with keys of its JSON replaced; None takes one away."""
    whole = wire.encode("r", "j", IDS, IMAGES, ROWS)
    (length,) = struct.unpack_from("<I", whole, 8)
    header = json.loads(whole[12 : 12 + length]) | changes
    text = json.dumps({k: v for k, v in header.items() if v is not None}).encode()
    return whole[:8] + struct.pack("<I", len(text)) + text + whole[12 + length :]


def test_a_request_comes_out_as_it_went_in():
    question = wire.decode(wire.encode("r", "j", IDS, IMAGES, ROWS), LIMITS)
    assert (question.request, question.judge, question.ids) == ("r", "j", IDS)
    images, rows = question.unpack()
    for got, sent in zip(images, IMAGES, strict=True):
        np.testing.assert_array_equal(got, sent)
    for got, sent in zip(rows, ROWS, strict=True):
        assert got.keys() == sent.keys()
        assert {**got, SOURCES: 0} == {**sent, SOURCES: 0}
        for a, b in zip(got.get(SOURCES, []), sent.get(SOURCES, []), strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_same_question_has_the_same_bytes():
    assert body() == body()


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"x": float("nan")}, "finite numbers"),
        ({"x": float("inf")}, "finite numbers"),
        ({"x": np.float32(1)}, "cannot travel as JSON"),
        ({"x": {1: 2}}, "text keys"),
        ({"x": (1, 2)}, "in place of tuples"),
        ({"x": b"bytes"}, "cannot travel as JSON"),
        ({"x": "\ud83d\ude00"}, "change on their way"),  # two halves of one character
        ({SOURCES: image()}, "wanted a list of images"),
        ({SOURCES: [image().astype(float)]}, r"\[0\]: got float64"),
        ({SOURCES: [np.zeros((0, 2, 3), np.uint8)]}, r"\[0\]: got uint8 \[0, 2, 3\]"),
    ],
)
def test_a_row_that_cannot_travel_is_refused_by_name(row, text):
    with pytest.raises(WireError, match=text):
        wire.check_row(row)
    with pytest.raises(WireError, match="row 'b': "):
        wire.encode("r", "j", ["a", "b"], [image(), image()], [{}, row])


def test_deep_metadata_are_refused():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(WireError, match="cannot travel"):
        wire.check_row({"x": deep})


def test_metadata_without_end_are_refused():
    with pytest.raises(TooLarge, match="send fewer rows at a time"):
        wire.encode("r", "j", ["0"], [image()], [{"prompt": "x" * (wire.HEADER_BYTES + 1)}])


ROW = {"id": "0", "metadata": {}, "sources": None}
MALFORMED = {
    "empty": (b"", "begins b''"),
    "a form": (b"--boundary\r\nContent-Disposition: form-data", "begins b'--bounda'"),
    "cut in the JSON": (body()[:50], "the body was cut"),
    "cut in an image": (body()[:-1], "bytes came"),
    "longer": (body() + b"x", "bytes came"),
    "no JSON": (wire.MAGIC + struct.pack("<I", 4) + b"{,,}", "is no JSON"),
    "not UTF-8": (wire.MAGIC + struct.pack("<I", 2) + b"\xff\xfe", "is no JSON"),
    "deep": (wire.MAGIC + struct.pack("<I", 10**6) + b"[" * 10**6, "is no JSON"),
    "a list": (wire.MAGIC + struct.pack("<I", 2) + b"[]", "a list; wanted a JSON object"),
    "another version": (body(version=2), "version 2; this side speaks 1"),
    "true as version": (body(version=True), "version True"),
    "no version": (body(version=None), "version None"),
    "no rows": (body(rows=[]), "rows: "),
    "no judge": (body(judge=None), "judge: Field required"),
    "a number as judge": (body(judge=3), "judge: "),
    "a strange key": (body(pickle="..."), "pickle: "),
    "ids are numbers": (body(rows=[ROW | {"id": 0}]), "rows.0.id"),
    "metadata are a list": (body(rows=[ROW | {"metadata": []}]), "rows.0.metadata"),
    "doubled ids": (body(rows=[ROW] * 3), "row id '0' came 3 times"),
    "sources in metadata": (body(rows=[ROW | {"metadata": {SOURCES: []}}]), "sent as PNG"),
    "negative sources": (body(rows=[ROW | {"sources": -1}]), "rows.0.sources"),
    "fewer images": (body(images=[10]), "1 images came; the rows have 5"),
    "sizes that do not add up": (body(images=[1, 1, 1, 1, 1]), "should have 5 bytes"),
    "zero bytes": (body(images=[0, 1, 1, 1, 1]), "images.0"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_request_is_refused_with_what_came(what):
    data, text = MALFORMED[what]
    with pytest.raises(WireError, match=text):
        wire.decode(data, LIMITS)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000])
def test_numbers_that_are_none_are_refused(number):
    text = body(judge="NUMBER").replace(b'"NUMBER"', number.encode())
    text = wire.MAGIC + struct.pack("<I", text.index(b"\x89PNG") - 12) + text[12:]
    with pytest.raises(WireError, match="is no JSON"):
        wire.decode(text, LIMITS)


def test_an_image_is_refused_by_the_row_it_belongs_to():
    files = [len(b"not a png")] * 5
    with pytest.raises(WireError, match="row '0': got 9 bytes that begin b'not a pn'"):
        wire.decode(body(images=files).split(b"\x89PNG")[0] + b"not a png" * 5, LIMITS)


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"body_bytes": 100}, "at most 100 are taken"),
        ({"rows": 2}, "3 rows came; at most 2"),
        ({"image_pixels": 23}, "row '0': got a PNG of 6 x 4 = 24 pixels; at most 23"),
        ({"request_pixels": 67}, "68 pixels; at most 67 are taken in one request"),
    ],
)
def test_each_limit_is_kept(limits, text):
    with pytest.raises(TooLarge, match=text):
        wire.decode(body(), Limits(**limits))
    wire.decode(body(), Limits(**dict.fromkeys(limits, 10**6)))


def test_a_header_without_end_is_refused_by_its_length():
    with pytest.raises(TooLarge, match="the JSON has 4294967295 bytes"):
        wire.decode(wire.MAGIC + b"\xff" * 4 + b"{}", LIMITS)


SCORED_ROWS = Scored(
    np.array([0.1, -3.5e38 / 2, 0, 7], np.float32),
    np.array([SCORED, SCORED, FAILED, MISSING], np.int8),
    {2: "the judge raised"},
)
FOUR = ["a", "b", "c", "d"]


def test_an_answer_comes_out_as_it_went_in():
    got = wire_answer.decode(wire_answer.encode("r", FOUR, SCORED_ROWS), "r", FOUR)
    np.testing.assert_array_equal(got.values[:2], SCORED_ROWS.values[:2])
    np.testing.assert_array_equal(got.status, SCORED_ROWS.status)
    assert got.reasons == SCORED_ROWS.reasons
    assert (got.values.dtype, got.status.dtype) == (np.float32, np.int8)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(deadline=None)
def test_every_float32_comes_out_as_it_went_in(value):
    sent = Scored(np.array([value], np.float32), np.zeros(1, np.int8))
    got = wire_answer.decode(wire_answer.encode("r", ["0"], sent), "r", ["0"])
    assert got.values.tobytes() == sent.values.tobytes()


def test_no_nan_leaves():
    with pytest.raises(ValueError, match="JSON compliant"):
        wire_answer.encode("r", ["0"], Scored(np.array([np.nan]), np.zeros(1, np.int8)))


def answer(*results, **changes):
    return json.dumps({"version": 1, "request": "r", "results": results} | changes).encode()


def scored(name, score=1.0, **more):
    return {"id": name, "status": "scored", "score": score} | more


def test_the_order_does_not_matter():
    got = wire_answer.decode(answer(*[scored(n, i) for i, n in enumerate("dbca")]), "r", FOUR)
    np.testing.assert_array_equal(got.values, [3, 1, 2, 0])
    assert (got.status == SCORED).all()


@pytest.mark.parametrize(
    ("results", "text"),
    [
        ([], "no result"),
        ([scored("a"), scored("a", 2.0)], "2 results"),
        ([scored("a", None)], "'scored' and score None"),
        ([{"id": "a", "status": "scored"}], "'scored' and score None"),
        ([{"id": "a", "status": "failed", "score": 0.0}], "'failed' and score 0.0"),
        ([{"id": "a", "status": "missing", "score": 0.0}], "'missing' and score 0.0"),
        ([{"id": "a", "status": "failed"}], "no reason given"),
    ],
)
def test_a_row_without_one_sound_result_has_failed_alone(results, text):
    got = wire_answer.decode(answer(*results, scored("b", 0.5)), "r", ["a", "b"])
    np.testing.assert_array_equal(got.status, [FAILED, SCORED])
    assert got.values[1] == 0.5
    assert list(got.reasons) == [0]
    assert text in got.reasons[0]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "is no JSON"),
        (b"<html>", "begins b'<html>'"),
        (b"null", "wanted a JSON object"),
        (answer(scored("a"), request="other"), "to request 'other'"),
        (answer(scored("a"), scored("z")), "row 'z', which was not sent"),
        (answer(scored("a"), version=9), "version 9"),
        (answer(scored("a"), results={}), "results: "),
        (answer(scored("a", "1")), "results.0.score"),
        (answer(scored("a", True)), "results.0.score"),
        (answer(scored("a", 1e300)), "results.0.score"),
        (answer(scored("a", 10**400)), "results.0.score"),
        (answer(scored("a", float("nan"))), "NaN is no JSON"),
        (answer(scored("a", float("inf"))), "Infinity is no JSON"),
        (answer(scored("a")).replace(b"1.0", b"1e999"), "too large"),
        (answer({"id": "a", "status": "fine"}), "results.0.status"),
        (answer(scored("a"))[:-3], "is no JSON"),
    ],
)
def test_an_answer_that_cannot_be_trusted_is_refused_whole(data, text):
    with pytest.raises(WireError, match=text):
        wire_answer.decode(data, "r", ["a"])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
KEYS = ["version", "request", "judge", "images", "rows", "results", "id", "status", "score"]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_changed_requests_raise_nothing_but_wire_error(data):
    changed = bytearray(body())
    for _ in range(data.draw(st.integers(1, 5))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(changed)))
    with contextlib.suppress(WireError):
        wire.decode(bytes(changed[:cut]), LIMITS).unpack()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_raise_nothing_but_wire_error(data, framed):
    if framed:
        data = wire.MAGIC + struct.pack("<I", len(data)) + data
    with pytest.raises(WireError):
        wire.decode(data, LIMITS)
    with pytest.raises(WireError):
        wire_answer.decode(data, "r", ["a"])


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON))
def test_strange_json_raises_nothing_but_wire_error(changes):
    text = json.dumps({"version": 1, "request": "r"} | changes).encode()
    for decode in (
        lambda: wire.decode(wire.MAGIC + struct.pack("<I", len(text)) + text, LIMITS).unpack(),
        lambda: wire_answer.decode(text, "r", ["a"]),
    ):
        with contextlib.suppress(WireError):
            decode()
