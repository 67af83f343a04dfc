"""The judge behind a server: the same number as in this process, and every way a server fails.

The good server is real (uvicorn on 127.0.0.1) and computes with stock transformers: the chat
template, one forward without a cache for every token. The bad ones are raw sockets.
"""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from pydantic import ValidationError
from small_judges import RUBRIC, next_logprobs, picture, write_base, write_rows
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from worlds import held_port

from qirl_fast.rewards.judge import FAILED, SCORED, SOURCES
from qirl_fast.rewards.vlm.folder import load_model, load_processor
from qirl_fast.rewards.vlm.images import read_image
from qirl_fast.rewards.vlm.local import Settings as LocalSettings
from qirl_fast.rewards.vlm.local import Vlm
from qirl_fast.rewards.vlm.openai import OpenAi, Settings
from qirl_fast.train_reward import main

PROMPTS = [{"prompt": p} for p in ("a red circle", "two blue squares", "a green triangle")]


class Model:
    """Serves a folder in the API's form; `top` is the most top_logprobs it lists."""

    def __init__(self, folder: Path, top: int = 512) -> None:
        self.model, self.processor = (
            load_model(folder, None, "float32", "cpu"),
            load_processor(folder),
        )
        self.top = top
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []

    async def answer(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        return JSONResponse(self.complete(body))

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        images: list[np.ndarray] = []
        talk = [self._message(message, images) for message in body["messages"]]
        text = self.processor.tokenizer.apply_chat_template(
            talk,
            tokenize=False,
            add_generation_prompt=body.get("add_generation_prompt", True),
            continue_final_message=body.get("continue_final_message", False),
        )
        random = torch.Generator().manual_seed(body.get("seed", 0) % 2**31)
        content, written = [], ""
        for _ in range(body["max_tokens"]):
            logp = next_logprobs(self.model, self.processor, text + written, images)
            if body["temperature"] == 0.0:
                token = int(logp.argmax())
            else:
                p = (logp / body["temperature"]).softmax(0)
                token = int(torch.multinomial(p, 1, generator=random))
            listed = logp.topk(min(self.top, body.get("top_logprobs", 1), len(logp)))
            likely = zip(listed.indices.tolist(), listed.values.tolist(), strict=True)
            top = [{"token": self._text(i), "logprob": v} for i, v in likely]
            content.append({"token": self._text(token), "top_logprobs": top})
            if token == self.processor.tokenizer.eos_token_id:
                break
            written += self._text(token)
        logprobs = {"content": content} if body.get("logprobs") else None
        message = {"role": "assistant", "content": written}
        return {"choices": [{"message": message, "logprobs": logprobs}]}

    def _text(self, token: int) -> str:
        return self.processor.tokenizer.decode([token])

    def _message(self, message: dict[str, Any], images: list[np.ndarray]) -> dict[str, Any]:
        if isinstance(message["content"], str):
            return message
        parts = []
        for part in message["content"]:
            if part["type"] == "image_url":
                data = part["image_url"]["url"].removeprefix("data:image/png;base64,")
                images.append(np.array(Image.open(io.BytesIO(base64.b64decode(data)))))
                parts.append({"type": "image"})
            else:
                parts.append(part)
        return {"role": message["role"], "content": parts}


@contextmanager
def serving(endpoint: Callable[[Request], Any]) -> Iterator[str]:
    app = Starlette(routes=[Route("/v1/chat/completions", endpoint, methods=["POST"])])
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(base: Path) -> Model:
    return Model(base)


@pytest.fixture(scope="module")
def url(model: Model) -> Iterator[str]:
    with serving(model.answer) as address:
        yield address


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A judge that writes a few words and "Score: N", and the rows it learnt that from."""
    folder = tmp_path_factory.mktemp("trained")
    rows = write_rows(folder)
    (folder / "recipe.yaml").write_text(
        f"run: judge\noutput: {folder}\nthreads: 1\n"
        f"model: {{path: {base}, adapter: full, vision: true}}\n"
        f"data: {{file: {rows}, rubrics: {{alignment: {RUBRIC!r}}}}}\n"
        "train: {steps: 45, batch: 8, micro_batch: 8, lr: 0.005, warmup: 5}\nloss: {text: 1.0}\n"
        "validation: {rows: 1, reasonings: 0, bootstrap: 100}\n"
        "tracking: {tensorboard: false, checkpoint_every: 0}\n"
    )
    assert main([str(folder / "recipe.yaml")]) == 0
    return folder / "judge" / "judge", rows


def judge(url: str, **settings: Any) -> OpenAi:
    given = {"kind": "openai", "url": url, "model": "tiny", "dimension": "alignment"}
    given |= {"rubric": RUBRIC, "top_logprobs": 512, "timeout_s": 60.0, "retries": 0}
    return OpenAi(Settings.model_validate(given | settings))


def local(folder: Path, **settings: Any) -> Vlm:
    given = {"kind": "vlm", "path": str(folder), "dimension": "alignment", "rubric": RUBRIC}
    return Vlm(LocalSettings.model_validate(given | settings))


def images(count: int = 3, height: int = 64, width: int = 96) -> np.ndarray:
    return np.stack([picture(height, width, seed) for seed in range(count)])


@pytest.mark.parametrize("how", [{"reasonings": 0}, {"reasonings": 0, "reading": "yes_no"}])
def test_the_same_number_as_in_this_process(base: Path, url: str, how: dict[str, Any]) -> None:
    """float32 on both sides, with and without a cache: equal to rounding."""
    there, here = judge(url, **how), local(base, **how)
    found, own = there(images(), PROMPTS), here(images(), PROMPTS)
    assert found.status.tolist() == own.status.tolist() == [SCORED] * 3
    np.testing.assert_allclose(found.values, own.values, rtol=0, atol=1e-5)
    assert len(set(found.values.tolist())) == 3
    assert there.last["outside"] == pytest.approx(here.last["outside"], abs=1e-5)
    assert type(there).__mro__[1] is type(here).__mro__[1], "one scorer, two engines"


def test_the_same_number_for_an_edit(base: Path, url: str) -> None:
    one, two = picture(96, 64, 7), picture(64, 64, 8)
    rows = [{"prompt": "make it red", SOURCES: s} for s in ([one], [one, two], [two, one])]
    how = {"dimension": "instruction", "reasonings": 0}
    found, own = judge(url, **how)(images(), rows), local(base, **how)(images(), rows)
    np.testing.assert_allclose(found.values, own.values, rtol=0, atol=1e-5)
    same = images(1).repeat(3, 0)
    assert len(set(local(base, **how)(same, rows).values.tolist())) == 3, "all sources, in order"
    sent = judge(url, **how)(same[:1], [{"prompt": "make it red"}])
    assert sent.status.tolist() == [FAILED] and "no condition image" in sent.reasons[0]


def test_the_same_number_after_a_reasoning(trained: tuple[Path, Path]) -> None:
    folder, file = trained
    lines = [json.loads(line) for line in file.read_text().splitlines()][:4]
    pictures = [read_image(file.parent / line["image"]) for line in lines]
    served = Model(folder)
    with serving(served.answer) as url:
        there, here = judge(url, max_new_tokens=24), local(folder, max_new_tokens=24)
        found, own = there.score_rows(pictures, lines), here.score_rows(pictures, lines)
        np.testing.assert_allclose(found.values, own.values, rtol=0, atol=1e-5)
        assert there.last["closed"] == here.last["closed"] == 0
        assert there.engine.requests == 4, "one request a row"
        assert np.abs(found.values - [line["score"] for line in lines]).mean() < 1
        written = judge(url, reading="integer", max_new_tokens=24)
        own_written = local(folder, reading="integer", max_new_tokens=24)
        values = written.score_rows(pictures, lines).values
        assert values.tolist() == own_written.score_rows(pictures, lines).values.tolist()
        assert set(values.tolist()) <= {1.0, 2.0, 3.0, 4.0, 5.0}
        assert "logprobs" not in served.bodies[-1]
        sampled = judge(url, reasonings=3, max_new_tokens=24, temperature=1.5)
        first = sampled.score_rows(pictures[:1], lines[:1]).values
        asked = [body for body in served.bodies if "seed" in body]
        assert len({body["seed"] for body in asked}) == 3
        assert {body["temperature"] for body in asked} == {1.5}
        assert len(sampled.repeats[0]) == 3
        assert sampled.score_rows(pictures[:1], lines[:1]).values == first


def test_a_reasoning_that_does_not_end_is_closed_and_counted(base: Path, url: str) -> None:
    asked = judge(url, max_new_tokens=3)
    found = asked(images(1), PROMPTS[:1])
    assert found.status.tolist() == [SCORED] and asked.last["closed"] == 1
    assert asked.engine.requests == 2


def test_what_is_asked(url: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    asked = judge(url, reasonings=0, api_key_env="JUDGE_KEY", top_logprobs=20)
    asked(images(1), PROMPTS[:1])
    body = model.bodies[-1]
    assert model.headers[-1]["authorization"] == "Bearer secret"
    assert (body["model"], body["max_tokens"], body["top_logprobs"]) == ("tiny", 1, 20)
    assert body["messages"][0]["content"][1]["text"] == f"{RUBRIC}\nPrompt: a red circle"
    assert body["messages"][1] == {"role": "assistant", "content": "Score: "}
    assert body["continue_final_message"] and not body["add_generation_prompt"]
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match="variable JUDGE_KEY is not set"):
        judge(url, api_key_env="JUDGE_KEY")
    for bad in ("127.0.0.1:8000", "ftp://x/v1", "http://x/v1?y=1", "http:///v1"):
        with pytest.raises(ValidationError):
            judge(bad)
    with pytest.raises(ValueError, match="is no address"):
        judge("http://127.0.0.1:99999999/v1")


def test_score_tokens_that_are_not_listed_fail_rather_than_be_wrong(base: Path) -> None:
    served = Model(base, top=3)
    with serving(served.answer) as url:
        found = judge(url, reasonings=0)(images(1), PROMPTS[:1])
    assert found.status.tolist() == [FAILED]
    assert "none of 1, 2, 3, 4, 5 is among the likely tokens" in found.reasons[0]


def completion(top: dict[str, float], token: str = "4") -> bytes:
    listed = [{"token": t, "logprob": v} for t, v in top.items()]
    content = [{"token": token, "top_logprobs": listed}]
    return json.dumps(
        {"choices": [{"message": {"content": token}, "logprobs": {"content": content}}]}
    ).encode()


def http(body: bytes, status: str = "200 OK", extra: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{extra}\r\n"
    return head.encode() + body


GOOD = http(completion({"4": -0.1, "3": -3.0, "5": -4.0, "2": -9.0, "1": -9.5}))
Act = Callable[[socket.socket], None]


@contextmanager
def raw(*acts: Act) -> Iterator[tuple[str, list[int]]]:
    """A server that reads a request and does the next act, the last one over and over."""
    listener = socket.create_server(("127.0.0.1", 0))
    calls: list[int] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            calls.append(1)
            act = acts[min(len(calls), len(acts)) - 1]
            threading.Thread(target=handle, args=(connection, act), daemon=True).start()

    def handle(connection: socket.socket, act: Act) -> None:
        with connection:
            try:
                read_request(connection)
                act(connection)
            except OSError:
                pass  # the judge hung up, as it should

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", calls
    finally:
        listener.close()


def read_request(connection: socket.socket) -> None:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536)


def say(data: bytes) -> Act:
    return lambda connection: connection.sendall(data)


def hang(connection: socket.socket) -> None:
    connection.settimeout(30)
    connection.recv(1)  # until the other side gives up


def drip(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    while True:
        connection.sendall(b" ")
        time.sleep(0.02)


def flood(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n")
    while True:
        connection.sendall(b"x" * 65536)


def flood_of_headers(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        connection.sendall(b"x" * 65536)


def one(url: str, **settings: Any) -> Any:
    given = {"reasonings": 0, "max_body": 100_000, "top_logprobs": 20}
    return judge(url, **(given | settings))(images(1), PROMPTS[:1])


BROKEN: dict[str, tuple[Act, str]] = {
    "hangs": (hang, r"no answer within 0\.5 s"),
    "drips": (drip, r"no answer within 0\.5 s"),
    "closes": (lambda connection: None, "RemoteProtocolError"),
    "closes half way": (say(GOOD[:-20]), "RemoteProtocolError"),
    "no http": (say(b"\x00\x01\x02 hello\r\n\r\n"), "RemoteProtocolError"),
    "10 GB": (flood, "longer than max_body 100000"),
    "endless header": (flood_of_headers, "RemoteProtocolError"),
    "500": (say(http(b"oom", "500 Internal Server Error")), "status 500: 'oom'"),
    "no json": (say(http(b"<html>")), "not a completion .*'<html>'"),
    "deep json": (say(http(b"[" * 50_000)), "not a completion"),
    "other json": (say(http(b'{"choices": []}')), "not a completion"),
    "no logprobs": (
        say(http(b'{"choices": [{"message": {"content": "4"}}]}')),
        "without log-probabilities serves reading: integer alone",
    ),
    "no tokens": (
        say(http(b'{"choices": [{"message": {"content": ""}, "logprobs": {"content": []}}]}')),
        "no tokens",
    ),
    "nan": (say(http(completion({"4": float("nan")}))), "'4' is nan"),
    "text for a number": (say(http(completion({"4": "high"}))), "not a completion"),  # type: ignore[dict-item]
    "a number beyond floats": (
        say(http(completion({"4": 7777777}).replace(b"7777777", b"9" * 999))),
        "not a completion",
    ),
    "gzip bomb": (
        say(http(gzip.compress(b" " * 10_000_000), extra="Content-Encoding: gzip\r\n")),
        "encoded as 'gzip'",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_server_fails_the_row_and_says_why(name: str) -> None:
    act, words = BROKEN[name]
    with raw(act) as (url, _):
        found = one(url, timeout_s=0.5 if "no answer" in words else 60.0)
    assert found.status.tolist() == [FAILED] and found.values.shape == (1,)
    assert re.search(words, found.reasons[0]), found.reasons[0]


def test_nobody_there() -> None:
    with held_port() as port:
        found = one(f"http://127.0.0.1:{port}/v1")
    assert found.status.tolist() == [FAILED] and "ConnectError" in found.reasons[0]


def test_failures_that_pass_are_asked_again_and_others_are_not() -> None:
    busy = say(http(b"", "503 Service Unavailable"))
    with raw(busy, lambda connection: None, say(GOOD)) as (url, calls):
        found = one(url, retries=3)
    assert found.status.tolist() == [SCORED] and len(calls) == 3
    p = np.exp([-9.5, -9.0, -3.0, -0.1, -4.0])
    assert found.values[0] == pytest.approx(float((p * np.arange(1, 6)).sum() / p.sum()), abs=1e-6)
    with raw(say(http(b"no such model", "404 Not Found"))) as (url, calls):
        found = one(url, retries=3)
    assert len(calls) == 1 and "status 404: 'no such model'" in found.reasons[0]
    with raw(busy) as (url, calls):
        found = one(url, retries=2)
    assert len(calls) == 3 and "status 503" in found.reasons[0] and "3 tries" in found.reasons[0]
    with raw(hang) as (url, calls):
        found = one(url, retries=50, timeout_s=1.0, deadline_s=3.0)
    assert found.status.tolist() == [FAILED] and 1 <= len(calls) <= 4, "the deadline ends it"


def test_the_deadline_is_that_of_the_whole_call() -> None:
    """Nine rows in turn at a server that never answers: one deadline, not nine."""
    deadline = 3.0
    began = time.monotonic()
    with raw(hang) as (url, calls):
        how = {"concurrency": 1, "retries": 50, "timeout_s": 60.0, "deadline_s": deadline}
        found = judge(url, reasonings=0, **how)(images(9, 32, 32), PROMPTS * 3)
    assert time.monotonic() - began < 4 * deadline
    assert found.status.tolist() == [FAILED] * 9 and len(calls) == 1
    over = "the call's deadline_s 3 s leaves no time: "
    assert all(over in reason for reason in found.reasons.values())
    said = Counter(reason.partition(over)[2] for reason in found.reasons.values())
    no_turn = "it had no turn, 1 requests being under way; 0 tries"
    assert said == {no_turn: 8, "no answer by then; 1 try": 1}


def test_rows_answered_before_the_deadline_stand() -> None:
    with raw(say(GOOD), hang) as (url, calls):
        how = {"concurrency": 1, "timeout_s": 60.0, "deadline_s": 5.0}
        found = judge(url, reasonings=0, **how)(images(3, 32, 32), PROMPTS)
    assert sorted(found.status.tolist()) == [SCORED, FAILED, FAILED] and len(calls) == 2


def test_one_bad_row_does_not_take_the_others_with_it() -> None:
    with raw(say(GOOD), say(http(b"bad", "400 Bad Request")), say(GOOD)) as (url, _):
        found = judge(url, reasonings=0, concurrency=1)(images(3), PROMPTS)
    assert sorted(found.status.tolist()) == [SCORED, SCORED, FAILED]
    (row,) = found.reasons
    assert found.status[row] == FAILED


def test_no_more_requests_at_once_than_allowed() -> None:
    now, most = [0], [0]
    lock, full = threading.Lock(), threading.Event()

    def slow(connection: socket.socket) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
            if now[0] == 3:
                full.set()
        full.wait(20)
        time.sleep(0.05)  # for a fourth
        with lock:
            now[0] -= 1
        connection.sendall(GOOD)

    with raw(slow) as (url, calls):
        found = judge(url, reasonings=0, concurrency=3)(images(9, 32, 32), PROMPTS * 3)
    assert (found.status == SCORED).all() and len(calls) == 9
    assert most[0] == 3


def test_missing_score_tokens_are_bounded() -> None:
    """Two of five listed, the rest at most as likely as the least listed: 1e-3 each."""
    top = {"4": np.log(0.6), "5": np.log(0.3), "x": np.log(0.001)}
    with raw(say(http(completion(top)))) as (url, _):
        found = one(url)
        assert found.values[0] == pytest.approx((4 * 0.6 + 5 * 0.3) / 0.9, abs=1e-6)
        low = (4 * 0.6 + 5 * 0.3 + 0.001 * (1 + 2 + 3)) / 0.903
        spread = (4 * 0.6 + 5 * 0.3) / 0.9 - low
        asked = judge(url, reasonings=0, top_logprobs=20)
        asked(images(1), PROMPTS[:1])
        assert asked.last["spread"] == pytest.approx(spread, abs=1e-9)
        assert one(url, max_spread=spread * 0.9).status.tolist() == [FAILED]


def test_a_mark_without_its_space_is_asked_again_from_the_space() -> None:
    entry = [
        {"token": t, "top_logprobs": [{"token": t, "logprob": -0.1}]} for t in ("Score", ":", "4")
    ]
    squeezed = {"choices": [{"message": {"content": "Score:4"}, "logprobs": {"content": entry}}]}
    with raw(say(http(json.dumps(squeezed).encode())), say(GOOD)) as (url, calls):
        asked = judge(url, top_logprobs=20)
        found = asked(images(1), PROMPTS[:1])
    assert len(calls) == 2 and found.status.tolist() == [SCORED] and asked.last["closed"] == 0


def test_a_reasoning_that_stops_early_is_continued_without_its_end_token() -> None:
    tokens = [
        {"token": t, "top_logprobs": [{"token": t, "logprob": -0.1}]}
        for t in ("fine", "<|im_end|>")
    ]
    early = {"choices": [{"message": {"content": "fine"}, "logprobs": {"content": tokens}}]}
    served: list[dict[str, Any]] = []

    async def answer(request: Request) -> JSONResponse:
        served.append(await request.json())
        return JSONResponse(early if len(served) == 1 else json.loads(completion({"4": -0.1})))

    with serving(answer) as url:
        asked = judge(url, max_spread=4.0, top_logprobs=20)
        found = asked(images(1), PROMPTS[:1])
    assert found.values.tolist() == [4.0] and asked.last["closed"] == 1
    assert served[1]["messages"][1]["content"] == "fine\nScore: "


def test_a_sampled_token_beside_the_list_does_not_bound_it() -> None:
    """vLLM lists the token that was drawn beside the top ones: here x, far below the two asked for.

    So the missing ones may be as likely as the second, 0.2, and 0.2 is left over in all.
    """
    top = {"4": np.log(0.6), "3": np.log(0.2), "x": -20.0}
    with raw(say(http(completion(top)))) as (url, _):
        asked = judge(url, reasonings=0, top_logprobs=2, max_spread=4.0)
        asked(images(1), PROMPTS[:1])
    low, high = (0.6 * 4 + 0.2 * 3 + 0.2 * s for s in (1, 5))
    assert asked.last["spread"] == pytest.approx(high - low, abs=1e-6)
