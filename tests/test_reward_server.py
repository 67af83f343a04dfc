"""The reward server on real sockets: who may ask, how much, what is computed once, how it ends."""

import re
import socket
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import uvicorn
from small_judges import picture, write_base

from qirl_fast.reward_app import App
from qirl_fast.rewards import preservation, wire, wire_answer
from qirl_fast.rewards.judge import FAILED, MISSING, SCORED, SOURCES
from qirl_fast.rewards.judges import Judges
from qirl_fast.rewards.remote import Remote, Settings
from qirl_fast.rewards.served import Served
from qirl_fast.rewards.vlm.local import Settings as LocalSettings
from qirl_fast.tiny import scenes

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 8, 6, 3), np.uint8)
ROWS = [{"prompt": "x" * i} for i in range(6)]
EXPECTED = np.array([im.mean() + i for i, im in enumerate(IMAGES)], np.float32)


class Mean:
    """A judge that counts its calls and waits while `gate` is closed."""

    def __init__(self):
        self.sizes, self.gate, self.began = [], threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, images, rows):
        self.sizes.append(images.shape)
        self.began.set()
        assert self.gate.wait(120)
        found = np.array([i.mean() + len(r["prompt"]) for i, r in zip(images, rows, strict=True)])
        if any(row.get("raise") for row in rows):
            raise RuntimeError("too dark")
        found[[bool(row.get("nan")) for row in rows]] = np.nan
        found = found[: len(found) - any(row.get("short") for row in rows)]
        return np.ma.masked_array(found, [bool(r.get("mask")) for r in rows][: len(found)])

    def check_row(self, row):
        if row.get("refuse"):
            raise ValueError("names no object")


@pytest.fixture
def mean(monkeypatch):
    """The judge "server_judges:mean", fresh."""
    module = types.ModuleType("server_judges")
    module.mean = Mean()
    monkeypatch.setitem(sys.modules, "server_judges", module)
    yield module.mean
    module.mean.gate.set()


@contextmanager
def serving(*names, token=None, requests=16, body_s=20.0, reask=1, specs=None, **limits):
    """The address of a server of these judges, in a thread."""
    judges = {
        n.rpartition(":")[2]: Served(Judges([n], specs or {}, reask=reask), kept=4) for n in names
    }
    app = App(judges, token, wire.Limits(**limits), requests, body_s)
    server = uvicorn.Server(
        uvicorn.Config(app.starlette(), http="h11", lifespan="off", log_config=None)
    )
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(120)
        assert not thread.is_alive()
        for judge in judges.values():
            judge.close()


@contextmanager
def remote(url, judge="mean", **settings):
    quick = {"deadline_s": 120, "attempt_s": 60, "backoff_s": 0.02, "backoff_max_s": 0.05}
    found = Remote(Settings(kind="remote", url=url, judge=judge, **quick | settings))
    try:
        yield found
    finally:
        found.close()


def body(request="r", judge="mean", images=IMAGES, rows=ROWS):
    return wire.encode(request, judge, [str(i) for i in range(len(rows))], images, rows)


def post(url, content=None, **headers):
    content = body() if content is None else content
    with httpx.Client(trust_env=False, timeout=120) as client:
        return client.post(f"{url}/score", content=content, headers=headers)


def get(url, **headers):
    return httpx.get(url, headers=headers, trust_env=False, timeout=120)


def test_scores_are_those_of_the_judge_here_however_rows_are_sent():
    rows = scenes.all_rows()[::23]
    rng = np.random.default_rng(1)
    images = np.stack([scenes.render(scenes.sample_scene(row, rng)) for row in rows])
    rows = rows[3:] + rows[:3]  # some are shown what they ask for, others not
    here = Judges(["alignment", "aesthetics"]).score(images, rows)
    assert len({*here.scores[:, 0]}) > 1 < len({*here.scores[:, 1]})
    with serving("alignment", "aesthetics") as url:
        for k, name in enumerate(("alignment", "aesthetics")):
            for rows_per_request in (1, 5, 100):
                with remote(url, name, rows_per_request=rows_per_request) as judge:
                    assert judge.warnings == []
                    scored = judge(images, rows)
                np.testing.assert_array_equal(scored.values, here.scores[:, k])
                np.testing.assert_array_equal(scored.status, here.status[:, k])


def test_judges_of_edits_see_the_condition_images_of_each_row(tmp_path):
    base = write_base(tmp_path)
    specs = {
        "follows": LocalSettings(
            kind="vlm", path=str(base), dimension="instruction", rubric="judge.", reasonings=0
        ),
        "keeps": preservation.Settings(kind="preservation"),
    }
    images = np.stack([picture(64, 64, i) for i in range(3)])
    other, region = picture(64, 96, 9), [[0.0, 0.0, 0.5, 0.5]]
    sources = [[images[0]], [other, images[2]], [images[1], other, images[2]]]
    rows = [{"prompt": "make it red", "region": region, SOURCES: s} for s in sources]
    rows[1] = {"prompt": "make it red"}
    here = Judges(list(specs), specs).score(images, rows)
    assert here.status.tolist() == [[SCORED] * 2, [FAILED, MISSING], [SCORED] * 2]
    assert here.scores[[0, 2], 1].tolist() == [1.0, 1.0]
    with serving(*specs, specs=specs) as url:
        for k, name in enumerate(specs):
            with remote(url, name, rows_per_request=2) as judge:
                scored = judge(images, rows)
            np.testing.assert_array_equal(scored.values[[0, 2]], here.scores[[0, 2], k])
            np.testing.assert_array_equal(scored.status, here.status[:, k])
            assert name != "follows" or "no condition image" in scored.reasons[1]


def test_images_of_one_size_are_judged_together_and_sizes_may_differ(mean):
    images = [IMAGES[0], IMAGES[1, :4], IMAGES[2], IMAGES[3, :, :1], IMAGES[4, :4], IMAGES[5]]
    with serving("server_judges:mean") as url:
        answer = post(url, body(images=images))
    scored = wire_answer.decode(answer.content, "r", [str(i) for i in range(6)])
    expected = np.array([im.mean() + i for i, im in enumerate(images)], np.float32)
    np.testing.assert_array_equal(scored.values, expected)
    assert sorted(size[0] for size in mean.sizes) == [1, 2, 3]


@pytest.mark.parametrize(
    ("key", "state", "reason"),
    [
        ("raise", FAILED, "too dark"),
        ("nan", FAILED, "scored nan"),
        ("short", FAILED, "the result has shape"),
        ("refuse", FAILED, "names no object"),
        ("mask", MISSING, None),
    ],
)
def test_one_bad_row_does_not_spoil_the_others(mean, key, state, reason):
    rows = [row | {key: True} if i == 2 else row for i, row in enumerate(ROWS)]
    with serving("server_judges:mean") as url, remote(url) as judge:
        scored = judge(IMAGES, rows)
        text = get(f"{url}/metrics").text
    others = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(scored.values[others], EXPECTED[others])
    np.testing.assert_array_equal(scored.status[others], np.full(5, SCORED))
    assert scored.status[2] == state
    assert ([reason in scored.reasons[2]] if reason else []) == [True] * len(scored.reasons)
    word = "failed" if state == FAILED else "missing"
    assert f'qirl_reward_rows_total{{judge="mean",state="{word}"}} 1' in text
    assert 'qirl_reward_rows_total{judge="mean",state="scored"} 5' in text


def test_a_question_asked_again_is_not_computed_again(mean):
    with serving("server_judges:mean") as url:
        first = post(url)
        assert post(url).content == first.content
        assert len(mean.sizes) == 1
        assert 'qirl_reward_repeated_total{judge="mean"} 1' in get(f"{url}/metrics").text
        post(url, body("another request"))
        post(url, body(rows=[{"prompt": "other"}] * 6))  # the same name, another question
        assert len(mean.sizes) == 3
        for i in range(5):
            post(url, body(str(i)))
        post(url)  # long ago: forgotten
        assert len(mean.sizes) == 9


def test_a_fault_of_the_server_is_not_kept(mean, monkeypatch, caplog):
    unpack, faults = wire.Question.unpack, [MemoryError("no room now")]

    def once(question):
        if faults:
            raise faults.pop()
        return unpack(question)

    monkeypatch.setattr(wire.Question, "unpack", once)
    with serving("server_judges:mean") as url:
        assert post(url).status_code == 500
        assert 'path="/score",status="500"} 1' in get(f"{url}/metrics").text
        assert post(url).status_code == 200
        assert post(url).status_code == 200
    assert len(mean.sizes) == 1


def test_a_question_asked_again_while_it_is_computed_waits_for_the_same_answer(mean):
    mean.gate.clear()
    with (
        serving("server_judges:mean", requests=2) as url,
        remote(url, attempt_s=0.3) as judge,
        ThreadPoolExecutor() as pool,
    ):
        scored = pool.submit(judge, IMAGES, ROWS)
        deadline = time.monotonic() + 120
        while 'repeated_total{judge="mean"} 0' in get(f"{url}/metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        mean.gate.set()
        np.testing.assert_array_equal(scored.result().values, EXPECTED)
    assert mean.sizes == [IMAGES.shape]


def test_a_full_server_sends_away_and_is_asked_again(mean):
    mean.gate.clear()
    with serving("server_judges:mean", requests=2) as url, ThreadPoolExecutor() as pool:
        held = [pool.submit(post, url, body(str(i))) for i in range(2)]
        while "qirl_reward_in_flight 2" not in get(f"{url}/metrics").text:
            time.sleep(0.02)
        refused = post(url, body("third"))
        assert refused.status_code == 503
        assert refused.headers["Retry-After"] == "1"
        assert "2 requests are held already" in refused.json()["error"]
        assert get(f"{url}/health").status_code == 200
        with remote(url, rows_per_request=1, concurrency=3) as judge:
            scored = pool.submit(judge, IMAGES, ROWS)
            time.sleep(0.3)
            assert not scored.done()
            mean.gate.set()
            np.testing.assert_array_equal(scored.result().values, EXPECTED)
        assert [one.result().status_code for one in held] == [200, 200]
        assert "qirl_reward_in_flight 0" in get(f"{url}/metrics").text


def test_two_clients_at_once_get_their_own_scores(mean):
    with (
        serving("server_judges:mean") as url,
        remote(url, rows_per_request=1) as one,
        remote(url, rows_per_request=2) as two,
        ThreadPoolExecutor() as pool,
    ):
        calls = [pool.submit(judge, IMAGES, ROWS) for judge in (one, two) * 3]
        for call in calls:
            np.testing.assert_array_equal(call.result().values, EXPECTED)


@pytest.mark.parametrize("client", ["Bearer wrong-token-wrong", "Basic abc", "Bearer", None])
def test_who_has_no_token_gets_nothing(mean, client):
    headers = {} if client is None else {"Authorization": client}
    with serving("server_judges:mean", token="the-right-token-1") as url:
        for answer in (post(url, **headers), get(f"{url}/metrics", **headers)):
            assert answer.status_code == 401
            assert "wanted the header Authorization: Bearer <token>" in answer.json()["error"]
            assert "right" not in answer.text
        health = get(f"{url}/health", **headers)
        assert health.status_code == (401 if client else 200)
        assert "judges" not in health.json()
    assert not mean.sizes


def test_who_has_the_token_is_served(mean, monkeypatch):
    monkeypatch.setenv("QIRL_TEST_TOKEN", "the-right-token-1")
    with serving("server_judges:mean", token="the-right-token-1") as url:
        with remote(url, token_env="QIRL_TEST_TOKEN") as judge:
            assert judge.warnings == []
            np.testing.assert_array_equal(judge(IMAGES, ROWS).values, EXPECTED)
        with remote(url) as judge:
            assert "set token_env" in judge(IMAGES, ROWS).reasons[0]
        monkeypatch.setenv("QIRL_TEST_TOKEN", "another")
        with remote(url, token_env="QIRL_TEST_TOKEN") as judge:
            assert "put the server's token into the variable QIRL" in judge(IMAGES, ROWS).reasons[0]
            assert "status 401" in judge.warnings[0]


def test_another_judge_is_not_found(mean):
    with serving("server_judges:mean") as url, remote(url, "median") as judge:
        assert "serves ['mean'], not 'median'" in judge.warnings[0]
        assert (
            "judge 'median' is not served here; served are mean" in judge(IMAGES, ROWS).reasons[0]
        )
        assert "median" not in get(f"{url}/metrics").text  # clients add no labels


@pytest.mark.parametrize("method", ["GET", "PUT"])
@pytest.mark.parametrize("path", ["/score", "/", "/../etc/passwd"])
def test_other_paths_and_methods_are_not_served(mean, method, path):
    with serving("server_judges:mean") as url:
        answer = httpx.request(method, url + path, trust_env=False)
        assert answer.status_code in (404, 405)
        assert "wanted POST /score, GET /health or GET /metrics" in answer.json()["error"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "wanted b'QIRLRWRD'"),
        (b"\x80\x04\x95pickle", "wanted b'QIRLRWRD'"),
        (body()[:-1], "bytes came"),
        (body()[:200], "the body was cut"),
        (body().replace(b'"version": 1', b'"version": 7'), "version 7; this side speaks 1"),
        (body().replace(b"IDAT", b"IDAX"), "row '0': got a damaged PNG"),
    ],
)
def test_a_malformed_request_is_told_what_came_and_what_is_wanted(mean, content, text):
    with serving("server_judges:mean") as url:
        answer = post(url, content)
        assert answer.status_code == 400
        assert text in answer.json()["error"]
        assert post(url).status_code == 200
    assert mean.sizes == [IMAGES.shape]


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"body_bytes": 100}, "the body has .* bytes; at most 100 are taken: send fewer rows"),
        ({"rows": 5}, "6 rows came; at most 5"),
        ({"image_pixels": 47}, "row '0': got a PNG of 6 x 8 = 48 pixels; at most 47"),
        ({"request_pixels": 287}, "288 pixels; at most 287"),
    ],
)
def test_what_is_over_a_limit_is_told_so(mean, limits, text):
    with serving("server_judges:mean", **limits) as url:
        answer = post(url)
        assert answer.status_code == 413
        assert re.search(text, answer.json()["error"])
        with remote(url) as judge:
            assert "lower rows_per_request, or raise" in judge(IMAGES, ROWS).reasons[0]
    assert not mean.sizes


def test_a_body_without_end_is_cut_off_while_it_comes(mean):
    sent = 0

    def endless():
        nonlocal sent
        while sent < 2**28:
            sent += 2**16
            yield bytes(2**16)

    with serving("server_judges:mean", body_bytes=2**20) as url:
        try:
            answer = post(url, endless())
            assert answer.status_code == 413
            assert "over 1048576 bytes" in answer.json()["error"]
        except httpx.ReadError:  # the answer may be lost with the bytes on their way
            pass
        assert sent < 2**27
        assert post(url).status_code == 200


def test_a_huge_body_is_refused_by_its_length(mean):
    with serving("server_judges:mean", body_bytes=2**20) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 20) as connection:
            connection.sendall(
                b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n"
            )
            answer = connection.makefile("rb").read()
    assert b"413" in answer.split(b"\r\n")[0]
    assert b"the body has 10000000000 bytes" in answer


def test_a_body_that_does_not_come_is_not_waited_for(mean):
    with serving("server_judges:mean", body_s=0.2) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 20) as connection:
            connection.sendall(
                b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc"
            )
            answer = connection.makefile("rb").read()
        assert b"408" in answer.split(b"\r\n")[0]
        assert b"3 bytes came in 0.2 s" in answer
        with socket.create_connection((host, int(port)), 20) as connection:
            connection.sendall(
                b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc"
            )
        counted = r'path="/score",status="4\d\d"} (\d+)'
        while sum(map(int, re.findall(counted, get(f"{url}/metrics").text))) < 2:
            time.sleep(0.02)
        assert "qirl_reward_in_flight 0" in get(f"{url}/metrics").text


def test_a_packed_body_is_refused(mean):
    with serving("server_judges:mean") as url:
        answer = post(url, **{"Content-Encoding": "gzip"})
        assert answer.status_code == 415
        assert "packed (gzip)" in answer.json()["error"]


def test_metrics_are_prometheus_text(mean):
    with serving("server_judges:mean") as url:
        post(url)
        post(url, b"garbage")
        answer = get(f"{url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    for line in lines:
        pattern = r'# (HELP|TYPE) \w+ .+|\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [0-9.e+-]+'
        assert re.fullmatch(pattern, line), line
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['qirl_reward_requests_total{path="/score",status="200"}'] == "1"
    assert values['qirl_reward_requests_total{path="/score",status="400"}'] == "1"
    assert values['qirl_reward_rows_total{judge="mean",state="scored"}'] == "6"
    assert values['qirl_reward_seconds_bucket{judge="mean",le="+Inf"}'] == "1"
    assert values['qirl_reward_seconds_count{judge="mean"}'] == "1"
    assert float(values['qirl_reward_seconds_sum{judge="mean"}']) > 0
