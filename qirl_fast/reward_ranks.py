"""Reward ranks: processes of a run that train nothing and serve its judges to those that do.

The reward server's app, on a port of its own and with a token that rank 0 draws. Through the store
in which torchrun's processes met they tell each other:

    token      rank 0     what the others must show
    N          server N   its address, or what is wrong with the judges
    over       rank 0     the training has ended, in whichever way
    gone/N     server N   it needs the store no more, which rank 0 may hold

A server that dies is asked again until processes.timeout_s; torchrun starts all anew before that.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, Store

from qirl_fast.config import Config, ConfigError
from qirl_fast.config.server import is_loopback
from qirl_fast.data.prompts import load_prompts
from qirl_fast.distributed import PeerFailed, World, started
from qirl_fast.interruption import Interruption
from qirl_fast.listening import listen, reward_library
from qirl_fast.preflight import row_problems
from qirl_fast.rewards import remote
from qirl_fast.rewards.judges import Judges
from qirl_fast.rewards.png import MAX_PIXELS
from qirl_fast.rewards.served import Served
from qirl_fast.rewards.wire import Limits
from qirl_fast.tiny import packaged
from qirl_fast.trainer import judging_device, prepare_device

TOKEN = "QIRL_REWARD_RANKS_TOKEN"  # the variable from which a client of this process reads it
GRACE_S = 5
GOODBYE_S = 10.0
LOOK_S = 0.2  # between looks into the store
ANY = Limits(body_bytes=2**40, rows=2**20, image_pixels=MAX_PIXELS, request_pixels=2**40)


def _store(world: World) -> Store:
    assert world.store is not None
    return PrefixStore("rewards", world.store)


def _told(store: Store, key: str, timeout_s: float = float("inf")) -> str:
    """What was left under the key, waited for. PeerFailed where it does not come."""
    end = time.monotonic() + timeout_s
    try:
        while not store.check([key]):
            if time.monotonic() > end:
                raise PeerFailed(f"the judges were not served within {timeout_s:g} s")
            time.sleep(LOOK_S)
        return store.get(key).decode()
    except RuntimeError as error:
        if isinstance(error, PeerFailed):
            raise
        raise PeerFailed(f"the store of the processes is gone ({error})") from error


@contextmanager
def told_when_over(world: World, rewards: int) -> Iterator[None]:
    """Rank 0: give `rewards` servers their token; at the end tell them that it is the end."""
    if world.rank or not rewards:
        yield
        return
    store = _store(world)
    store.set("token", secrets.token_hex(32))
    try:
        yield
    finally:
        with suppress(RuntimeError):  # one of them is gone without a word
            store.set("over", "")
            gone = [f"gone/{number}" for number in range(rewards)]
            store.wait(gone, timedelta(seconds=GOODBYE_S))


def served(cfg: Config, world: World) -> dict[str, remote.Settings]:
    """Where a training process finds each judge of the recipe, waited for; {} without servers.

    ConfigError: what is wrong with the judges. PeerFailed: no word came.
    """
    count, limit_s = cfg.processes.rewards, cfg.processes.timeout_s
    if not count:
        return {}
    store, urls = _store(world), []
    for number in range(count):
        found = json.loads(_told(store, str(number), limit_s))
        if found["problems"]:
            raise ConfigError(found["problems"])
        urls.append(found["url"])
    os.environ[TOKEN] = store.get("token").decode()
    return {
        name: remote.Settings(
            kind="remote",
            url=urls[world.rank % count],
            judge=name,
            token_env=TOKEN,
            deadline_s=limit_s,
            attempt_s=limit_s,
            rows_per_request=cfg.rollout.max_rows,  # a chunk is one batch, as in one process
            max_response_bytes=2**30,
        )
        for name in [*cfg.rewards, *cfg.watch]
    }


def serve(cfg: Config, world: World) -> None:
    """Serve the recipe's judges until rank 0 says that it is over.

    ConfigError: the judges cannot be served, as the others hear. Interrupted: by a signal.
    """
    store, number = _store(world), world.rank - world.size
    judges: dict[str, Served] = {}
    with Interruption() as interruption, interruption.allowed():
        try:
            try:
                judges, server, listening = _server(cfg, world, _told(store, "token"))
            except (ValueError, OSError, ImportError) as error:
                problems = getattr(error, "problems", [str(error)])
                store.set(str(number), json.dumps({"problems": problems}))
                raise ConfigError(problems) from error
            host, port = listening.getsockname()[:2]
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            store.set(str(number), json.dumps({"url": url, "problems": []}))
            _until_over(server, listening, store)
        finally:
            with suppress(RuntimeError):
                store.set(f"gone/{number}", "")
            for judge in judges.values():
                judge.close()


def _server(cfg: Config, world: World, token: str) -> tuple[dict[str, Served], Any, socket.socket]:
    """The judges, the uvicorn server and a socket that listens."""
    library, device = reward_library(), prepare_device(cfg)
    if device == "cpu":
        torch.set_num_threads(1)  # as a training process has it: the same bits
    loaded = {
        name: Judges([name], cfg.judges, judging_device(device), cfg.failures.reask)
        for name in [*cfg.rewards, *cfg.watch]
    }
    problems = list(_problems(cfg, loaded))
    if problems:
        raise ConfigError(problems)
    judges = {name: Served(one) for name, one in loaded.items()}
    requests = 4 * len(judges) * world.size
    app = library.App(judges, token, ANY, requests, cfg.processes.timeout_s)
    listening = listen(_address(), 0)
    listening.listen()
    return judges, library.server_of(app, requests, GRACE_S), listening


def _problems(cfg: Config, loaded: dict[str, Judges]) -> Iterator[str]:
    """What only the judges know: rows that one cannot score, states that nobody would save."""
    stateful = ", ".join(name for name, judges in loaded.items() if judges.state_dict())
    if stateful:
        yield (
            f"processes.rewards: judges {stateful} keep a state of all they have seen, which a "
            "checkpoint of the others would not hold; set it to 0 and start one process, or serve "
            "them with qirl_fast.reward_server"
        )
    data = cfg.data
    for name, root in ((data.train, data.images), (data.heldout, data.heldout_images)):
        file = packaged(name)
        rows = load_prompts(file, root)
        for judges in loaded.values():
            yield from row_problems(cfg, judges, rows, {}, file)


def _address() -> str:
    """Of this machine, as the run's others reach it: loopback where there are none."""
    if int(os.environ.get("LOCAL_WORLD_SIZE", started())) == started():
        return "127.0.0.1"
    master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    family, kind, _, _, where = socket.getaddrinfo(*master, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)  # sends nothing; only a way is chosen
        found = str(probe.getsockname()[0])
    if is_loopback(found):
        raise ConfigError(
            [
                f"processes.rewards: the first machine, {master[0]}, is reached from here by "
                f"{found}, which others do not reach; start torchrun with --local-addr ADDRESS"
            ]
        )
    return found


def _until_over(server: Any, listening: socket.socket, store: Store) -> None:
    """Serve; PeerFailed where the store is gone, and with it whoever would say that it is over."""
    lost: list[PeerFailed] = []

    def look() -> None:
        try:
            _told(store, "over")
        except PeerFailed as error:
            lost.append(error)
        server.should_exit = True

    threading.Thread(target=look, daemon=True).start()
    server.run(sockets=[listening])
    if lost:
        raise lost[0]
