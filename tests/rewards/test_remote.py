"""The client against servers that misbehave on real sockets: no score is lost, none made up."""

import json
import random
import re
import socket
import threading
import time
from collections import Counter
from concurrent.futures import Future
from contextlib import contextmanager, suppress

import numpy as np
import pytest
from pydantic import ValidationError
from worlds import held_port

from qirl_fast.rewards import wire, wire_answer
from qirl_fast.rewards.judge import FAILED, MISSING, SCORED, SOURCES, Scored
from qirl_fast.rewards.remote import Remote, Settings
from qirl_fast.rewards.remote_http import Problem

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 8, 6, 3), np.uint8)
ROWS = [{"prompt": "x" * i, "tag": "t"} for i in range(7)]
EXPECTED = np.array(
    [im.mean() + len(row["prompt"]) for im, row in zip(IMAGES, ROWS, strict=True)], np.float32
)
QUICK = {"deadline_s": 120, "attempt_s": 60, "backoff_s": 0.01, "backoff_max_s": 0.05}
BRIEF = QUICK | {"deadline_s": 0.8, "attempt_s": 0.25}


def sound(question):
    """The answer of a sound server as a dict."""
    images, rows = question.unpack()
    values = [im.mean() + len(row["prompt"]) for im, row in zip(images, rows, strict=True)]
    scored = Scored(np.array(values, np.float32), np.zeros(len(rows), np.int8))
    return json.loads(wire_answer.encode(question.request, question.ids, scored))


def http(body, status="200 OK", *headers):
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(text)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + text


def says(text, status="200 OK", *headers):
    return lambda server, connection, question: connection.sendall(http(text, status, *headers))


def changed(change):
    """A sound answer after `change` was made to it."""

    def act(server, connection, question):
        answer = sound(question)
        connection.sendall(http(change(answer) or answer))

    return act


def good(server, connection, question):
    connection.sendall(http(sound(question)))


def hang(server, connection, question):
    server.stopped.wait(10)


def close(server, connection, question):
    connection.shutdown(socket.SHUT_RDWR)


def close_within(server, connection, question):
    connection.sendall(http(sound(question))[:-20])
    connection.shutdown(socket.SHUT_RDWR)


def reset(server, connection, question):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    raise OSError("closed by `talk`")


def garbage(server, connection, question):
    connection.sendall(b"\0\xffno HTTP at all" * 10)
    connection.shutdown(socket.SHUT_RDWR)


def endless(server, connection, question):
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while not server.stopped.is_set():
        connection.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        server.sent += 0x10000


def ten_gigabytes(server, connection, question):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n")
    while not server.stopped.is_set():
        connection.sendall(bytes(0x10000))
        server.sent += 0x10000


def endless_headers(server, connection, question):
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while not server.stopped.is_set():
        connection.sendall(b"X-More: and more\r\n" * 100)


def drip(server, connection, question):
    for byte in http(sound(question)):
        connection.sendall(bytes([byte]))
        if server.stopped.wait(0.05):
            return


class Scripted:
    """A server that acts once a request, by the script; its last act is repeated."""

    def __init__(self, *acts):
        self.acts, self.requests, self.headers = acts, [], []
        self.sent = 0
        self.stopped, self.lock = threading.Event(), threading.Lock()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with suppress(OSError):
            while True:
                connection = self.socket.accept()[0]
                threading.Thread(target=self.talk, args=(connection,), daemon=True).start()

    def talk(self, connection):
        with suppress(OSError), connection, connection.makefile("rb") as file:
            while head := file.readline():
                headers = {}
                while line := file.readline().strip():
                    key, _, value = line.decode().partition(": ")
                    headers[key.lower()] = value
                body = file.read(int(headers.get("content-length", 0)))
                if len(body) < int(headers.get("content-length", 0)):
                    return  # given up while it came
                question = wire.decode(body, wire.Limits()) if body else None
                with self.lock:
                    act = self.acts[min(len(self.requests), len(self.acts) - 1)]
                    self.requests.append((head, body))
                    self.headers.append(headers)
                act(self, connection, question)

    def stop(self):
        self.stopped.set()
        self.socket.close()


@contextmanager
def serving(*acts, **settings):
    """(server, judge) of a script and settings."""
    server = Scripted(*acts)
    judge = Remote(Settings(kind="remote", url=server.url, judge="far", **QUICK | settings))
    try:
        yield server, judge
    finally:
        server.stop()
        judge.close()


def check_sound(scored):
    np.testing.assert_array_equal(scored.status, np.full(7, SCORED))
    np.testing.assert_array_equal(scored.values, EXPECTED)
    assert (scored.values.dtype, scored.status.dtype) == (np.float32, np.int8)
    assert not scored.reasons


@pytest.mark.parametrize("rows_per_request", [1, 2, 7, 100])
def test_scores_do_not_depend_on_how_rows_are_sent(rows_per_request):
    with serving(good, rows_per_request=rows_per_request) as (server, judge):
        check_sound(judge(IMAGES, ROWS))
        check_sound(judge(IMAGES, ROWS))
        assert len(server.requests) == 2 * -(-7 // rows_per_request)


def test_condition_images_travel():
    def act(server, connection, question):
        assert question is not None
        _, rows = question.unpack()
        values = [sum(int(s.sum()) for s in row[SOURCES]) for row in rows]
        scored = Scored(np.array(values, np.float32), np.zeros(len(rows), np.int8))
        connection.sendall(http(wire_answer.encode(question.request, question.ids, scored)))

    sources = [[], [IMAGES[0, :3]], [IMAGES[1], IMAGES[2, :, :2]]]
    with serving(act) as (_, judge):
        got = judge(IMAGES[:3], [{"prompt": "", SOURCES: s} for s in sources])
    np.testing.assert_array_equal(got.values, [sum(int(s.sum()) for s in row) for row in sources])


TRANSIENT = {
    "hangs": (hang, "no answer within 0.25 s"),
    "closes": (close, "RemoteProtocolError|ReadError"),
    "closes within the answer": (close_within, "RemoteProtocolError|ReadError"),
    "resets": (reset, "ReadError|RemoteProtocolError"),
    "garbage": (garbage, "RemoteProtocolError"),
    "no JSON": (says(b"<html>Welcome</html>"), "is no JSON"),
    "endless": (endless, "over 4194304 bytes"),
    "10 GB": (ten_gigabytes, "over 4194304 bytes"),
    "endless headers": (endless_headers, "RemoteProtocolError|no answer within"),
    "drips": (drip, "no answer within 0.25 s"),
    "packed": (says(b"\x1f\x8b", "200 OK", "Content-Encoding: gzip"), r"packed \(gzip\)"),
    "NaN": (changed(lambda a: a["results"][0].update(score=float("nan"))), "NaN is no JSON"),
    "infinity": (changed(lambda a: a["results"][0].update(score=1e39)), "results.0.score"),
    "another question's": (changed(lambda a: a.update(request="x")), "to request 'x'"),
    "a strange row": (changed(lambda a: a["results"][0].update(id="99")), "'99', which was not"),
    "another version": (changed(lambda a: a.update(version=2)), "version 2"),
    "500": (says({"error": "oh"}, "500 Internal Server Error"), "status 500: oh"),
    "502 of a proxy": (says(b"<html>bad gateway", "502 Bad Gateway"), "status 502: b'<html>"),
    "503": (says({"error": "full"}, "503 Service Unavailable"), "status 503: full"),
    "429": (says({"error": "often"}, "429 Too Many Requests"), "status 429: often"),
}


@pytest.mark.chaos("a reward server down, slow, lying: asked again, then its rows fail")
@pytest.mark.parametrize("what", TRANSIENT)
def test_a_server_that_heals_costs_no_score(what):
    act, text = TRANSIENT[what]
    seconds = 0.25 if "no answer within" in text else 60

    def last(server, connection, question):  # who is healed may take its time
        judge.settings = judge.settings.model_copy(update={"attempt_s": 60.0})
        act(server, connection, question)

    with serving(act, last, good, rows_per_request=4, attempt_s=seconds, concurrency=1) as (
        server,
        judge,
    ):
        check_sound(judge(IMAGES, ROWS))
        assert server.sent < 2**26
        bodies = [body for _, body in server.requests]
        assert bodies[0] == bodies[1] == bodies[2] != bodies[3]  # one question, the same bytes


@pytest.mark.chaos("a reward server down, slow, lying: asked again, then its rows fail")
@pytest.mark.parametrize("what", TRANSIENT)
def test_a_server_that_does_not_heal_fails_the_rows_with_the_reason(what):
    act, text = TRANSIENT[what]
    seconds = 0.25 if "no answer within" in text else 60
    with serving(act, attempt_s=seconds, retries=1) as (server, judge):
        scored = judge(IMAGES, ROWS)
    # Of a short attempt the server may not even hear.
    assert len(server.requests) == 2 or (seconds < 60 and len(server.requests) < 2)
    np.testing.assert_array_equal(scored.status, np.full(7, FAILED))
    assert sorted(scored.reasons) == list(range(7))
    for reason in scored.reasons.values():
        assert server.url in reason and "(after 1 retries, as allowed)" in reason
        assert re.search(text, reason)


@pytest.mark.chaos("a reward server down, slow, lying: asked again, then its rows fail")
@pytest.mark.parametrize("act", [hang, close, drip])
def test_a_call_ends_at_its_deadline(act):
    begin = time.monotonic()
    with serving(act, **BRIEF) as (_, judge):
        scored = judge(IMAGES, ROWS)
        assert time.monotonic() - begin < 30
    np.testing.assert_array_equal(scored.status, np.full(7, FAILED))
    assert "not scored within 0.8 s: " in scored.reasons[6]


PERMANENT = {
    "400": (says({"error": "row '0': bad"}, "400 Bad Request"), "status 400: row '0': bad"),
    "401": (says({"error": "no bearer"}, "401 Unauthorized"), "no bearer; set token_env"),
    "404": (says({"error": "no such"}, "404 Not Found"), "no such; set `judge`"),
    "413": (says({"error": "big"}, "413 Content Too Large"), "big; lower rows_per_request"),
    "redirect": (
        says(b"", "307 Temporary Redirect", "Location: http://127.0.0.1:1/"),
        "redirects are not followed",
    ),
    "no reward server": (says(b"<h1>Not found</h1>", "404 Not Found"), "status 404: b'<h1>"),
}


@pytest.mark.parametrize("what", PERMANENT)
def test_what_asking_again_would_not_mend_fails_at_once_with_what_to_do(what):
    act, text = PERMANENT[what]
    with serving(act, good, rows_per_request=4, concurrency=1) as (server, judge):
        scored = judge(IMAGES, ROWS)
        assert len(server.requests) == 2  # one for the first four rows, and the others are scored
    np.testing.assert_array_equal(scored.status, [FAILED] * 4 + [SCORED] * 3)
    np.testing.assert_array_equal(scored.values[4:], EXPECTED[4:])
    assert sorted(scored.reasons) == [0, 1, 2, 3]
    assert text in scored.reasons[0]


def shuffled(answer):
    random.Random(0).shuffle(answer["results"])


def test_results_in_another_order_are_matched_by_id():
    with serving(changed(shuffled)) as (_, judge):
        check_sound(judge(IMAGES, ROWS))


def replaced(*results):
    return changed(lambda answer: answer["results"].__setitem__(slice(0, 1), results))


@pytest.mark.chaos("a reward server down, slow, lying: asked again, then its rows fail")
@pytest.mark.parametrize(
    ("act", "text"),
    [
        (replaced(), "no result"),
        (replaced({"id": "1", "status": "missing"}), "no result"),
        (replaced(*[{"id": "0", "status": "scored", "score": 1}] * 2), "2 results"),
        (replaced({"id": "0", "status": "failed", "reason": "too dark"}), "too dark"),
    ],
)
def test_a_row_without_a_sound_result_fails_alone(act, text):
    with serving(act) as (server, judge):
        scored = judge(IMAGES, ROWS)
    assert scored.status[0] == FAILED
    assert text in scored.reasons[0]
    np.testing.assert_array_equal(scored.status[2:], np.full(5, SCORED))
    np.testing.assert_array_equal(scored.values[2:], EXPECTED[2:])
    assert len(server.requests) == 1


def test_missing_rows_are_missing():
    with serving(replaced({"id": "0", "status": "missing"})) as (_, judge):
        scored = judge(IMAGES, ROWS)
    np.testing.assert_array_equal(scored.status, [MISSING] + [SCORED] * 6)
    assert not scored.reasons


def test_metadata_that_cannot_travel_fail_their_row_alone():
    rows = [*ROWS[:3], {"prompt": "", "bad": {1, 2}}, *ROWS[4:]]
    with serving(good) as (_, judge):
        scored = judge(IMAGES, rows)
        with pytest.raises(ValueError, match="cannot travel as JSON"):
            judge.check_row(rows[3])
        judge.check_row(ROWS[0])
    np.testing.assert_array_equal(scored.status, [SCORED] * 3 + [FAILED] + [SCORED] * 3)
    assert "cannot travel as JSON" in scored.reasons[3]


@pytest.mark.parametrize(
    ("images", "rows"),
    [
        (IMAGES.astype(np.float32), ROWS),
        (IMAGES[..., :1], ROWS),
        (IMAGES[0], ROWS),
        (IMAGES, ROWS[:3]),
        (list(IMAGES), ROWS),
        (np.zeros((7, 0, 6, 3), np.uint8), ROWS),
    ],
)
def test_what_is_no_batch_of_images_is_refused_before_anything_is_sent(images, rows):
    with serving(good) as (server, judge):
        with pytest.raises(ValueError, match="wanted"):
            judge(images, rows)
        assert not server.requests


def test_no_rows_need_no_server():
    with serving(good) as (server, judge):
        assert judge(IMAGES[:0], []).values.shape == (0,)
        assert not server.requests


def test_retries_are_limited_where_asked():
    with serving(says({"error": "oh"}, "500 Oh"), retries=2) as (server, judge):
        scored = judge(IMAGES, ROWS)
        assert len(server.requests) == 3
    assert "status 500: oh (after 2 retries, as allowed)" in scored.reasons[0]


def test_the_server_is_not_asked_sooner_than_it_wishes():
    wish = says({"error": "full"}, "503 Service Unavailable", "Retry-After: 1")
    with serving(wish, good) as (_, judge):
        begin = time.monotonic()
        check_sound(judge(IMAGES, ROWS))
        assert time.monotonic() - begin >= 1
    with serving(says({"error": "full"}, "503 No", "Retry-After: 1000"), good) as (server, judge):
        scored = judge(IMAGES, ROWS)  # beyond the deadline: no use to wait for it
        assert len(server.requests) == 1
    assert "status 503: full" in scored.reasons[0]


def test_waits_grow_up_to_the_longest_and_are_not_all_alike():
    judge = Remote(Settings(kind="remote", url="http://x", judge="far", backoff_max_s=4))
    for attempt, longest in enumerate([0.5, 1, 2, 4, 4, 4]):
        waits = [judge._wait(Problem("full"), attempt) for _ in range(50)]
        assert longest / 2 <= min(waits) < max(waits) < longest
    assert judge._wait(Problem("full"), 10**6) <= 4


def test_jitter_does_not_draw_from_the_runs_generators():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    with serving(close, good) as (_, judge):
        check_sound(judge(IMAGES, ROWS))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002


def test_requests_in_flight_are_bounded_over_all_calls():
    now, most = [0], [0]
    full = threading.Event()

    def slow(server, connection, question):
        with server.lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
            if now[0] == 3:
                full.set()
        full.wait(20)
        time.sleep(0.03)  # for a fourth
        with server.lock:  # before the answer, which makes room
            now[0] -= 1
        good(server, connection, question)

    with serving(slow, rows_per_request=1, concurrency=3) as (server, judge):
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(judge(IMAGES, ROWS))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 3
        for scored in found:
            check_sound(scored)
        assert most[0] == 3
        assert len(server.requests) == 21


def test_rows_whose_turn_never_comes_say_so():
    # One attempt outlasts the deadline: no turn is given back before it.
    brief = BRIEF | {"deadline_s": 2.0, "attempt_s": 30.0}
    with serving(hang, rows_per_request=4, concurrency=1, **brief) as (_, judge):
        scored = judge(IMAGES, ROWS)
    reasons = Counter("waited for its turn" in reason for reason in scored.reasons.values())
    assert reasons in (Counter({False: 4, True: 3}), Counter({False: 3, True: 4}))


def test_closing_ends_its_thread_and_a_later_call_opens_anew():
    with serving(good) as (_, judge):
        for _ in range(2):
            check_sound(judge(IMAGES, ROWS))
            assert any(t.name == "remote judge" for t in threading.enumerate())
            judge.close()
            judge.close()
            assert not any(t.name == "remote judge" for t in threading.enumerate())


def test_calls_may_end_while_it_closes():
    judge = Remote(Settings(kind="remote", url="http://x", judge="far"))

    class Ending(Future):
        def cancel(self):  # as far as its call's thread gets meanwhile
            judge._running.discard(self)
            return super().cancel()

    calls = [Ending(), Ending()]
    judge._running.update(calls)
    judge.close()
    assert all(call.cancelled() for call in calls)


def test_a_server_that_is_away_is_a_warning_and_not_an_error(caplog):
    with held_port() as port:
        url, few = f"http://127.0.0.1:{port}", QUICK | {"retries": 3}
        away = Remote(Settings(kind="remote", url=url, judge="far", **few))
        assert len(away.warnings) == 1
        assert "python -m qirl_fast.reward_server" in away.warnings[0]
        scored = away(IMAGES, ROWS)
    assert "ConnectError" in scored.reasons[0]
    assert len([r for r in caplog.records if "asking again" in r.message]) == 1
    away.close()


@pytest.mark.parametrize(
    ("act", "text"),
    [
        (says({"judges": ["near"]}), r"serves \['near'\], not 'far'"),
        (says({"status": "ok"}), "no reward server"),
        (says([1]), "no reward server"),
        (says(b"hello"), "no reward server"),
        (says({"error": "another bearer token"}, "401 Unauthorized"), "another bearer token"),
        (ten_gigabytes, "over 65536 bytes"),
    ],
)
def test_a_server_that_is_not_the_right_one_is_a_warning(act, text):
    with serving(act) as (_, judge):
        assert len(judge.warnings) == 1
        assert re.search(text, judge.warnings[0])
    with serving(says({"judges": ["near", "far"]})) as (_, judge):
        assert judge.warnings == []


def test_the_token_is_sent_and_never_shown(monkeypatch, caplog):
    monkeypatch.setenv("QIRL_TEST_TOKEN", "s3cret-of-the-server")
    caplog.set_level(0)
    with serving(close, good, token_env="QIRL_TEST_TOKEN") as (server, judge):
        check_sound(judge(IMAGES, ROWS))
        assert server.headers[0]["authorization"] == "Bearer s3cret-of-the-server"
        assert server.headers[0]["accept-encoding"] == "identity"
    assert "s3cret" not in caplog.text + repr(judge.settings)


@pytest.mark.parametrize("value", [None, "", "two words", "caf\xe9", "line\n"])
def test_a_token_that_is_none_is_refused_when_the_judge_is_built(monkeypatch, value):
    monkeypatch.delenv("QIRL_TEST_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("QIRL_TEST_TOKEN", value)
    with pytest.raises(ValueError, match=r"variable QIRL_TEST_TOKEN .*export QIRL_TEST") as caught:
        Remote(Settings(kind="remote", url="http://x", judge="far", token_env="QIRL_TEST_TOKEN"))
    assert not value or value not in str(caught.value)


def test_a_certificate_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "empty.pem").write_text("nothing")
    for name in ("empty.pem", "none.pem"):
        with pytest.raises(ValueError, match=r"ca_file: .*wanted a PEM file"):
            Remote(
                Settings(kind="remote", url="https://x", judge="far", ca_file=str(tmp_path / name))
            )


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:80",
        "ftp://x",
        "http://",
        "http:///score",
        "http://user:secret@x",
        "http://x?token=1",
        "http://x#y",
        "http://x:99999",
        "http://x:port",
    ],
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ValidationError, match="url"):
        Settings(kind="remote", url=url, judge="far")


def test_a_path_before_the_server_is_kept():
    with serving(good) as (server, _):
        judge = Remote(Settings(kind="remote", url=f"{server.url}/a/b/", judge="far", **QUICK))
        check_sound(judge(IMAGES, ROWS))
        judge.close()
        assert server.requests[-1][0].startswith(b"POST /a/b/score ")


def test_a_proxy_in_the_environment_is_not_used(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    with serving(good) as (_, judge):
        check_sound(judge(IMAGES, ROWS))
