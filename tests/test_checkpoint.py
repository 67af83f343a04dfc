"""Checkpoints: exact round trips, crash safety under kill -9, and damage that must be noticed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from qirl_fast.checkpoint import (
    CheckpointError,
    find_latest,
    load_checkpoint,
    pack,
    rng_state,
    save_checkpoint,
    set_rng_state,
    truncate_metrics,
    unpack,
)


def same(a: object, b: object) -> bool:
    """Equal in type, order and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        bits_a, bits_b = a.contiguous().reshape(-1), b.contiguous().reshape(-1)
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(bits_a.view(torch.uint8), bits_b.view(torch.uint8))
        )
    if isinstance(a, dict):
        assert isinstance(b, dict)
        return list(map(repr, a)) == list(map(repr, b)) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        assert isinstance(b, (list, tuple))
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        assert isinstance(b, float)
        return a.hex() == b.hex()
    return a == b


def through_disk(tree: object, folder: Path) -> object:
    tensors, data = pack(tree)
    path = save_checkpoint(folder, 1, tensors, {"tree": data}, None, keep=1)
    loaded = load_checkpoint(path)
    return unpack(loaded.tensors, loaded.state["tree"])


def test_pack_is_exact_through_the_disk(tmp_path: Path) -> None:
    nan_bits = torch.tensor([0x7FC00123, -1, 0], dtype=torch.int32).view(torch.float32)
    tree = {
        0: {"exp_avg": torch.randn(3, 4).to(torch.bfloat16), "step": torch.tensor(7.0)},
        "0": [1, 2.5, -0.0, 1e-320, 0.1 + 0.2, float("inf"), float("-inf"), float("nan")],
        "betas": (0.9, 0.999),
        "nested": ((), [], {}, (None, True, False, "x", 2**80)),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "index": torch.tensor([2**62, -1], dtype=torch.int64),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
        "half": torch.randn(2, dtype=torch.float16),
        "nan": nan_bits,
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        True: "a key that equals 1",
        "a": {"b/c": torch.ones(1)},
        "a/b": {"c": torch.zeros(1)},
        (1, "t"): "tuple key",
    }
    assert same(through_disk(tree, tmp_path), tree)


def test_pack_refuses_what_json_would_change() -> None:
    with pytest.raises(TypeError, match=r"cannot save state/lr: got numpy\.float64"):
        pack({"state": {"lr": np.float64(1.0)}})
    with pytest.raises(TypeError, match="got collections"):
        pack({"queue": __import__("collections").deque()})


def test_tensors_that_share_memory_are_saved_apart(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    tensors = {"flat": flat, "same": flat, "row": flat.view(3, 4)[1], "turned": flat.view(3, 4).T}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, tensors, {}, None, keep=1))
    assert same(loaded.tensors, {name: tensors[name] for name in loaded.tensors})
    assert loaded.tensors.keys() == tensors.keys()


def make_optimizer() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    groups: list[dict[str, object]] = [
        {"params": [model.weight]},
        {"params": [model.bias], "lr": 3e-3},
    ]
    return model, torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), amsgrad=True)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        scale = random.random() + np.random.rand()  # noqa: NPY002
        (scale * model(torch.randn(4, 5)).square().sum()).backward()
        optimizer.step()


def test_optimizer_and_rng_resume_to_the_bit(tmp_path: Path) -> None:
    model, optimizer = make_optimizer()
    np.random.standard_normal()  # noqa: NPY002 (leaves a cached normal in the state)
    train(model, optimizer, 3)
    tree = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    back = through_disk({**tree, "rng": rng_state()}, tmp_path)
    assert isinstance(back, dict)
    train(model, optimizer, 3)
    straight = (random.random(), np.random.randn(3).tolist(), torch.randn(3))  # noqa: NPY002

    again, other = make_optimizer()
    again.load_state_dict(back["model"])
    other.load_state_dict(back["optimizer"])
    set_rng_state(back["rng"])
    train(again, other, 3)
    assert same((random.random(), np.random.randn(3).tolist(), torch.randn(3)), straight)  # noqa: NPY002
    assert same(dict(again.state_dict()), dict(model.state_dict()))
    assert same(other.state_dict(), optimizer.state_dict())


def test_layout_latest_and_pruning(tmp_path: Path) -> None:
    for step in (2, 4, 10):
        save_checkpoint(tmp_path, step, {"w": torch.full((3,), step)}, {"step": step}, None, keep=2)
    root = tmp_path / "checkpoints"
    assert sorted(os.listdir(root)) == ["checkpoint-10", "checkpoint-4", "latest"]
    assert os.readlink(root / "latest") == "checkpoint-10"
    assert sorted(os.listdir(root / "latest")) == [
        "manifest.json",
        "state.json",
        "state.safetensors",
    ]
    manifest = json.loads((root / "latest/manifest.json").read_text())
    assert set(manifest["files"]) == {"state.json", "state.safetensors"}
    found = load_checkpoint(root / "latest")
    assert (found.step, found.state, found.tensors["w"].tolist()) == (10, {"step": 10}, [10] * 3)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert find_latest(tmp_path) is None
    (tmp_path / "checkpoints" / ".beside-3").mkdir(parents=True)
    assert find_latest(tmp_path) is None


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        save_checkpoint(tmp_path, 5, {"w": torch.tensor(value)}, {}, None, keep=3)
    found = find_latest(tmp_path)
    assert found is not None and found.tensors["w"].item() == 2.0
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["checkpoint-5", "latest"]


def test_killed_between_the_two_renames_of_a_replacement(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, {"w": torch.tensor(1.0)}, {}, None, keep=3)
    root = tmp_path / "checkpoints"
    (root / "checkpoint-5").rename(root / "checkpoint-5.replaced")
    found = find_latest(tmp_path)
    assert found is not None and (found.step, found.tensors["w"].item()) == (5, 1.0)


def test_saving_before_later_steps_deletes_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3, 2):
        save_checkpoint(tmp_path, step, {}, {}, None, keep=9)
    root = tmp_path / "checkpoints"
    assert sorted(os.listdir(root)) == ["checkpoint-1", "checkpoint-2", "latest"]
    assert "checkpoint-3 is deleted" in caplog.text


@pytest.mark.parametrize("state", [{"a": (1, 2)}, {"a": {1: 2}}, {"a": float("nan")}, {"a": {1}}])
def test_state_that_json_changes_is_refused(tmp_path: Path, state: dict[str, object]) -> None:
    save_checkpoint(tmp_path, 1, {}, {"a": 1}, None, keep=1)
    with pytest.raises(CheckpointError, match="pack"):
        save_checkpoint(tmp_path, 2, {}, state, None, keep=1)
    found = find_latest(tmp_path)
    assert found is not None and found.step == 1


def two_checkpoints(folder: Path) -> Path:
    """Make checkpoints 1 and 2 with every kind of file, and return the folder of 2."""
    lora = ({"blk.to_q.lora_A.weight": torch.randn(2, 4)}, {"r": 2, "lora_alpha": 3.0})
    for step in (1, 2):
        tensors = {"w": torch.randn(50), "step": torch.tensor(step)}
        save_checkpoint(folder, step, tensors, {"position": step}, lora, keep=2)
    return folder / "checkpoints" / "checkpoint-2"


def flip(path: Path, index: int) -> None:
    data = bytearray(path.read_bytes())
    data[index] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "first byte": lambda path: flip(path, 0),
    "a byte in the middle": lambda path: flip(path, path.stat().st_size // 2),
    "last byte": lambda path: flip(path, -1),
    "cut in half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "deleted": lambda path: path.unlink(),
}
FILES = [
    "lora/adapter_model.safetensors",
    "lora/adapter_config.json",
    "pytorch_lora_weights.safetensors",
    "state.safetensors",
    "state.json",
    "manifest.json",
]


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_noticed_and_the_one_before_is_used(tmp_path: Path, name: str, kind: str) -> None:
    newest = two_checkpoints(tmp_path)
    files = {p.relative_to(newest).as_posix() for p in newest.rglob("*") if p.is_file()}
    assert files == set(FILES)
    DAMAGE[kind](newest / name)
    said: list[str] = []
    found = find_latest(tmp_path, said.append)
    assert found is not None and found.step == 1 and found.state == {"position": 1}
    assert found.tensors["step"].item() == 1
    assert name in said[0] and "checkpoint-2" in said[0] and "checkpoint-1" in said[1]
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(newest)


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    newest = two_checkpoints(tmp_path)
    manifest = newest / "manifest.json"
    for index in range(manifest.stat().st_size):
        flip(manifest, index)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            load_checkpoint(newest)
        flip(manifest, index)
    assert load_checkpoint(newest).step == 2


def test_damaged_checkpoint_is_not_counted_among_those_kept(tmp_path: Path) -> None:
    newest = two_checkpoints(tmp_path)
    flip(newest / "state.safetensors", -1)
    assert find_latest(tmp_path) is not None
    save_checkpoint(tmp_path, 3, {}, {}, None, keep=2)
    kept = sorted(os.listdir(tmp_path / "checkpoints"))
    assert kept == ["checkpoint-1", "checkpoint-3", "latest"]


def test_all_damaged_is_an_error_not_a_new_start(tmp_path: Path) -> None:
    newest = two_checkpoints(tmp_path)
    for folder in (newest, newest.with_name("checkpoint-1")):
        flip(folder / "state.json", 3)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint is left.*checkpoint-2.*-1"):
        find_latest(tmp_path)


def test_lost_link_takes_the_newest(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    (tmp_path / "checkpoints" / "latest").unlink()
    said: list[str] = []
    found = find_latest(tmp_path, said.append)
    assert found is not None and found.step == 2
    assert "latest is missing" in said[0]


KILLED_LOOP = """
import os, random, signal, sys, time
import torch
from qirl_fast.checkpoint import find_latest, save_checkpoint

folder = sys.argv[1]
random.seed(int(sys.argv[2]))
torch.set_num_threads(1)
interrupted = 0
for _ in range(15):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        found = find_latest(folder)
        step = found.step if found else 0
        while True:
            step += 1
            tensors = {str(n): torch.full((20000,), step) for n in range(2)}
            save_checkpoint(folder, step, tensors, {"step": step}, None, keep=2)
            os.write(writer, step.to_bytes(4, "little"))
    os.close(writer)
    done = os.read(reader, 4)
    time.sleep(random.uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while block := os.read(reader, 4):
        done = block
    os.close(reader)
    root = os.path.join(folder, "checkpoints")
    interrupted += any(name.startswith(".beside") for name in os.listdir(root))
    said = []
    found = find_latest(folder, said.append)
    reached = int.from_bytes(done, "little")
    assert not said, said
    assert found is not None and reached <= found.step <= reached + 1, (found, reached)
    assert found.state == {"step": found.step}
    assert all((tensor == found.step).all() for tensor in found.tensors.values())
print(interrupted)
"""


def test_killed_at_random_moments_a_whole_checkpoint_is_always_found(tmp_path: Path) -> None:
    """What was reported saved is there after kill -9, and what is there is whole."""
    result = subprocess.run(
        [sys.executable, "-c", KILLED_LOOP, str(tmp_path), "1"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 2, "too few of the 15 kills fell inside a save to show anything"
    save_checkpoint(tmp_path, 10**6, {}, {}, None, keep=1)
    left = sorted(os.listdir(tmp_path / "checkpoints"))
    assert left == ["checkpoint-1000000", "latest"], "leftovers of a crash must be cleaned"


FULL_DISK = """
import resource, signal, sys
import torch
from qirl_fast.checkpoint import save_checkpoint

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save_checkpoint(sys.argv[1], 1, {"w": torch.ones(10)}, {}, None, keep=2)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
save_checkpoint(sys.argv[1], 2, {"w": torch.ones(1 << 20)}, {}, None, keep=2)
"""


def test_disk_that_refuses_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode != 0 and "File too large" in result.stderr, result.stderr
    found = find_latest(tmp_path)
    assert found is not None and found.step == 1
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["checkpoint-1", "latest"]


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert truncate_metrics(path, 3) == 0 and not path.exists()
    rows = [json.dumps({"step": step, "loss": 0.1 * step}) + "\n" for step in (0, 1, 2, 2, 3)]
    path.write_text("".join(rows) + '{"step": 4, "lo')
    assert truncate_metrics(path, 9) == 1
    assert path.read_text() == "".join(rows)
    untouched = path.stat().st_ino
    assert truncate_metrics(path, 3) == 0
    assert path.stat().st_ino == untouched
    assert truncate_metrics(path, 2) == 1
    assert path.read_text() == "".join(rows[:4])


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', ""])
def test_metrics_that_are_no_metrics_are_an_error(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
        truncate_metrics(path, 5)
