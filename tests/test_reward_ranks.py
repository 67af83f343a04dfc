"""Judges on processes of their own: the numbers are those of judges in the training processes."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore, PrefixStore
from worlds import content, ended

from qirl_fast import reward_ranks
from qirl_fast.config import ConfigError, load_config, training
from qirl_fast.distributed import PeerFailed, World
from qirl_fast.reward_ranks import TOKEN, served, told_when_over
from qirl_fast.trainer import judging_device

ROOT = Path(__file__).resolve().parents[1]
CHUNKS = ("rollout.max_rows=1", "train.updates_per_rollout=2", "evaluation.prompts=3")
SECRET = "feed" * 16
STATEFUL = """
class Seen:
    def __call__(self, images, metadata):
        return [0.5] * len(metadata)
    def state_dict(self):
        return {"seen": 0}
    def load_state_dict(self, state):
        pass
score = Seen()
"""


@pytest.mark.parametrize(("count", "rewards"), [(2, 1), (4, 2)])
def test_the_bits_are_those_without_and_nobody_writes_the_token(
    processes, finished, tmp_path, count, rewards
) -> None:
    own = [*CHUNKS, f"processes.rewards={rewards}", f"output={tmp_path}", "run=r"]
    hook = f"""
import secrets
from qirl_fast.rewards import judges
secrets.token_hex = lambda count: {SECRET!r}
if int(os.environ["RANK"]) < {count - rewards}:
    judges.JUDGES["alignment"] = lambda images, rows: 1 / 0  # not to be asked here
"""
    runs = processes(count, own, hook=hook)
    assert ended(runs) == [0] * count, runs[0].output()
    assert content(tmp_path / "r", 2) == content(finished("alone", *CHUNKS), 2)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(SECRET.encode() in path.read_bytes() for path in files)
    assert not any(SECRET in run.output() for run in runs)
    for other in runs[1:]:
        assert "step" not in other.output()  # one of them speaks


def test_condition_images_reach_them(processes, tmp_path) -> None:
    recipe = str(ROOT / "configs" / "tiny_edit.yaml")
    few = ["train.steps=1", "data.prompts_per_step=2", "rollout.group_size=2", "evaluation.steps=2"]
    for count in (1, 2):
        own = [recipe, "threads=1", *few, "rollout.max_rows=2", "evaluation.prompts=2"]
        own += [f"output={tmp_path}", f"run=by{count}", f"processes.rewards={count - 1}"]
        runs = processes(count, own)
        assert ended(runs) == [0] * count, runs[0].output()
    assert content(tmp_path / "by2", 1) == content(tmp_path / "by1", 1)


@pytest.mark.chaos("SIGTERM to all, reward ranks among them: saved, status 143")
def test_a_signal_ends_all_of_them(processes, finished, meddle, tmp_path) -> None:
    hook = f"""
from pathlib import Path
place = Path({str(tmp_path)!r})
(place / f"pid-{{os.environ['RANK']}}").write_text(str(os.getpid()))
if os.environ["RANK"] == "0":
    exec({meddle("trainer.Trainer.rollout", 2, "end()")!r})
def end():
    for file in sorted(place.glob("pid-*"), reverse=True):
        os.kill(int(file.read_text()), signal.SIGTERM)
"""
    own = [*CHUNKS, f"output={tmp_path}", "run=r", "resume=auto", "processes.rewards=1"]
    runs = processes(2, own, hook="import signal\n" + hook)
    assert ended(runs) == [128 + signal.SIGTERM] * 2, runs[0].output()
    assert "stopped by SIGTERM, all steps that were finished saved" in runs[0].output()
    assert ended(processes(2, own)) == [0, 0]
    assert content(tmp_path / "r", 2) == content(finished("alone", *CHUNKS), 2)


NODE = """
import os, signal, sys
if os.environ["RANK"] == "2" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    from qirl_fast.rewards import served
    whole, left = served.score_rows, [8]  # two of the evaluation, four of each step
    def dies(*arguments):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments)
    served.score_rows = dies
from qirl_fast.train import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.chaos("a reward rank killed: torchrun starts all again, the same bits")
def test_a_reward_rank_is_killed(restarted, finished, tmp_path: Path) -> None:
    own = ["train.steps=3", "rollout.max_rows=4"]
    rest = ["processes.rewards=1", f"output={tmp_path}", "run=r", "resume=auto"]
    said = restarted(3, NODE, [*own, *rest])
    assert "from step 0 to 3, 2 processes" in said
    assert "from step 1 to 3, 2 processes" in said
    assert content(tmp_path / "r", 3) == content(finished("three", *own), 3)


def test_what_is_wrong_with_the_judges_ends_all_with_the_reason(processes, tmp_path) -> None:
    (tmp_path / "seen.py").write_text(STATEFUL)
    own = ["rewards={'seen:score': 1.0}", "rollout.max_rows=1", "processes.rewards=1"]
    runs = processes(3, [*own, f"output={tmp_path}", "run=r"], [tmp_path])
    assert ended(runs) == [2, 2, 2]
    assert "processes.rewards: judges seen:score keep a state" in runs[0].output()
    assert not (tmp_path / "r").exists()
    assert [run.output() for run in runs[1:]] == ["", ""]


def test_rows_that_a_served_judge_cannot_score_are_named(small, tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a red circle"}\n' * 3)
    own = [f"data.train={tmp_path / 'rows.jsonl'}", "rewards={alignment: 1.0}"]
    cfg = load_config([*small, *own])
    loaded = {"alignment": reward_ranks.Judges(["alignment"])}
    (problem,) = reward_ranks._problems(cfg, loaded)
    assert problem.startswith(f"{tmp_path / 'rows.jsonl'}:1: judge 'alignment' cannot score")


@pytest.mark.parametrize(("rewards", "processes"), [(1, 1), (2, 3), (5, 8)])
def test_more_servers_than_there_are_to_serve_are_refused(small, rewards, processes) -> None:
    cfg = load_config([*small, f"processes.rewards={rewards}"])
    with pytest.raises(ConfigError, match=f"got {rewards} of {processes} processes"):
        training(cfg, processes)
    assert training(cfg, 2 * rewards) == rewards


def test_no_judge_is_nothing_to_serve() -> None:
    recipe = str(ROOT / "configs" / "tiny_opd.yaml")
    with pytest.raises(ConfigError, match=r"processes\.rewards: got 1, and there is no judge"):
        load_config([recipe, "watch=[]", "processes.rewards=1"])


def test_each_process_asks_one_of_the_servers(small, monkeypatch) -> None:
    monkeypatch.setenv(TOKEN, "")
    cfg = load_config([*small, "processes={rewards: 2, timeout_s: 0.3}", "rollout.max_rows=5"])
    whole = HashStore()
    store = PrefixStore("rewards", whole)
    with pytest.raises(PeerFailed, match=r"not served within 0\.3 s"):
        served(cfg, World(0, 5, store=whole))
    store.set("token", SECRET)
    for number in (0, 1):
        store.set(str(number), json.dumps({"url": f"http://h:{number + 1}", "problems": []}))
    found = [served(cfg, World(rank, 5, store=whole))["alignment"] for rank in range(5)]
    assert [one.url for one in found] == [f"http://h:{1 + rank % 2}" for rank in range(5)]
    assert found[0].rows_per_request == 5 and os.environ[found[0].token_env] == SECRET
    store.set("1", json.dumps({"problems": ["no such model"]}))
    with pytest.raises(ConfigError, match="no such model"):
        served(cfg, World(0, 5, store=whole))


def test_the_end_is_told_however_it_comes() -> None:
    whole = HashStore()
    store = PrefixStore("rewards", whole)
    store.set("gone/0", "")
    with pytest.raises(KeyError), told_when_over(World(0, 2, store=whole), 1):
        assert len(store.get("token")) == 64 and not store.check(["over"])
        raise KeyError
    assert store.check(["over"])


def test_the_address_is_one_that_the_others_reach(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert reward_ranks._address() == "127.0.0.1"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ConfigError, match="start torchrun with --local-addr"):
        reward_ranks._address()
    asked = []

    class Probe(socket.socket):  # a machine with a way to the first, whatever this one has
        def connect(self, where) -> None:
            asked.append((self.type, where))

        def getsockname(self) -> tuple[str, int]:
            return "198.51.100.7", 40000

    monkeypatch.setenv("MASTER_ADDR", "198.51.100.1")
    monkeypatch.setattr(reward_ranks.socket, "socket", Probe)
    assert reward_ranks._address() == "198.51.100.7"
    assert asked == [(socket.SOCK_DGRAM, ("198.51.100.1", 29500))]


def test_judges_are_told_the_number_of_their_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert judging_device("cuda") == "cuda:3" and judging_device("cpu") == "cpu"
