"""Who may reach the page, and that a database has one server."""

import asyncio
import json
import os
import subprocess
import sys
import threading

import pytest

from qirl_fast.arena.__main__ import main
from qirl_fast.arena.server import Gate, only_one
from qirl_fast.config import ConfigError

TOKEN = "0123456789abcdef"


def ask(gate, path="/", query=b"", **headers):
    """(status, headers) of a request."""
    sent = []

    async def send(message):
        sent.append(message)

    named = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    scope = {"type": "http", "path": path, "query_string": query, "headers": named}
    asyncio.run(gate(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"])


async def page(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"page"})


def test_every_request_needs_the_token():
    gate = Gate(page, TOKEN, local=False)
    for path in ("/", "/picture/x", "/gradio_api/run/vote", "/config"):
        assert ask(gate, path)[0] == 401
        assert ask(gate, path, query=b"token=another-token-000")[0] == 401
        assert ask(gate, path, authorization="Bearer another")[0] == 401
        assert ask(gate, path, cookie="arena=another")[0] == 401
        assert ask(gate, path, cookie=f"arena={TOKEN}")[0] == 401  # the cookie is not the token
        assert ask(gate, path, authorization=f"Bearer {TOKEN}")[0] == 200


def test_the_token_in_the_address_leaves_a_cookie_and_the_address():
    gate = Gate(page, TOKEN, local=False)
    status, headers = ask(gate, query=f"token={TOKEN}".encode())
    assert status == 303 and headers[b"location"] == b"/"
    cookie = headers[b"set-cookie"].decode()
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and TOKEN not in cookie
    assert ask(gate, "/picture/x", cookie=cookie.partition(";")[0])[0] == 200
    assert ask(Gate(page, TOKEN[::-1], local=False), cookie=cookie.partition(";")[0])[0] == 401


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost", "[::1]:80"])
def test_without_a_token_only_this_machines_names_lead_here(host):
    """Another site's name that resolves to 127.0.0.1 does not (DNS rebinding)."""
    gate = Gate(page, None, local=True)
    assert ask(gate, host=host)[0] == 200
    for other in ("evil.example", "127.0.0.1.evil.example", "", "[::ffff]", "["):
        assert ask(gate, host=other)[0] == 421


def test_answers_may_not_be_framed_nor_tell_where_one_came_from():
    _, headers = ask(Gate(page, None, local=False))
    assert headers[b"x-frame-options"] == b"DENY" and headers[b"referrer-policy"] == b"no-referrer"


def test_other_protocols_get_nothing():
    asked = []

    async def app(scope, receive, send):
        asked.append(scope["type"])

    gate = Gate(app, None, local=False)
    asyncio.run(gate({"type": "websocket"}, None, None))
    asyncio.run(gate({"type": "lifespan"}, None, None))
    assert asked == ["lifespan"]


@pytest.fixture
def settings(folders, tmp_path):
    def write(**more):
        file = tmp_path / "arena.yaml"
        own = {"models": folders, "database": str(tmp_path / "votes.db"), "port": 0}
        file.write_text(json.dumps(own | more))
        return str(file)

    return write


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"host": "0.0.0.0"}, "host: 0.0.0.0 can be reached from other machines"),
        ({"host": "0.0.0.0", "token_env": "QIRL_NO_TOKEN"}, "QIRL_NO_TOKEN is not set or no token"),
        ({"level": 1}, "level: "),
        ({"judge": "alinment"}, "judge: no judge is called 'alinment'"),
        ({"votes_per_prompt": 0}, "votes_per_prompt: got 0"),
        ({"modles": {}}, "modles: unknown key"),
    ],
)
def test_settings_that_cannot_be_served_are_refused(settings, capsys, more, text):
    pytest.importorskip("gradio", reason="pip install 'qirl-fast[arena]'")
    assert main([settings(**more)]) == 2
    assert text in capsys.readouterr().err


def test_without_gradio_it_says_what_to_install(settings, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main([settings()]) == 2
    assert "`pip install 'qirl-fast[arena]'` brings it" in capsys.readouterr().err


def test_a_damaged_database_is_an_error_not_a_traceback(settings, capsys, tmp_path):
    pytest.importorskip("gradio", reason="pip install 'qirl-fast[arena]'")
    (tmp_path / "votes.db").write_bytes(b"no database " * 500)
    assert main([settings()]) == 2
    assert "votes.db: cannot be used as a database of votes" in capsys.readouterr().err


def test_a_second_arena_on_one_database_is_refused_naming_the_first(tmp_path):
    """Another process holds it; once that is killed, however, it is free."""
    database = tmp_path / "votes.db"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom qirl_fast.arena.server import only_one\n"
        "with only_one(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)\n"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(database)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert first.stdout.readline() == "held\n"
        said = f"is served by process {first.pid} already"
        with pytest.raises(ConfigError, match=said), only_one(database):
            pass
    finally:
        first.kill()
        first.wait()
    with only_one(database):
        assert (tmp_path / "votes.db.lock").read_text() == f"{os.getpid()}\n"


def test_a_lock_is_held_against_ones_own_threads_too(tmp_path):
    found = []

    def second():
        try:
            with only_one(tmp_path / "votes.db"):
                found.append("held")
        except ConfigError as error:
            found.append(str(error))

    with only_one(tmp_path / "votes.db"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(30)
    assert f"process {os.getpid()} already" in found[0]


def test_plan_and_help(capsys, monkeypatch):
    from qirl_fast.arena import __main__ as entry

    monkeypatch.setattr(entry, "MOST", 100)
    monkeypatch.setattr(entry, "SHARES", (0.55, 0.9))
    monkeypatch.setattr(entry, "TIES", (0.0,))
    assert main(["plan"]) == 0
    said = capsys.readouterr().out
    assert "over 100" in said
    assert main(["--help"]) == 0 and "judge SETTINGS" in capsys.readouterr().out
    assert main([]) == 2
