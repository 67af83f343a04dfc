"""Fixtures for the tests that need a model or a whole run.

Runs are real processes. Importing torch and diffusers takes seconds, so most of them are forked
from a server that has imported the trainer and done nothing else (`start`); a forked run starts
with random generators as fresh as those of a new interpreter.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: bits are compared, and cores are shared
os.environ["MKL_NUM_THREADS"] = "1"

import torch
from torch import Tensor
from worlds import environments

from qirl_fast.models.qwenimage21 import QwenImage21

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "qirl_fast" / "tiny" / "weights"

# Two updates of two prompts x four samples: what a run does, in two or three seconds. Whatever the
# tests count on is set here, not left to the packaged recipe, which is tuned for its result.
SMALL = (
    "threads=1",
    "seed=0",
    "model.adapter=lora",
    "model.lora={rank: 8, alpha: 16}",
    "train={steps: 2, lr: 0.002, warmup: 0, decay: 0, ema: null}",
    "algorithm={step_weights: noise, clip_low: 0.001, clip_high: 0.001}",
    "data.prompts_per_step=2",
    "rollout={group_size: 4, height: 64, width: 64, steps: 4, dynamics: flow_sde, eta: 0.7}",
    "rollout={window: {start: 0, size: 2}, guidance: 1.5, ratio_mode: frozen_offset}",
    "rollout.shared_noise=true",
    "rewards={alignment: 0.9, aesthetics: 0.1}",
    "evaluation={prompts: 4, samples_per_prompt: 1, steps: 3, guidance: 1.5}",
    "tracking={checkpoint_every: 1, keep_checkpoints: 2}",
)

# What a forked run executes. `hook` is source run first; it may patch what the run imports.
CHILD = """
import os, random, sys
import numpy
log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(log, 1)
os.dup2(log, 2)
sys.stdout = open(1, "w", buffering=1, closefd=False)
sys.stderr = open(2, "w", buffering=1, closefd=False)
random.seed(os.urandom(16))
numpy.random.seed(list(os.urandom(16)))
sys.path[:0] = PATHS
from qirl_fast.train import main
exec(HOOK)
code = main(ARGV)
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


@dataclass
class Run:
    """A forked `python -m qirl_fast.train`."""

    process: BaseProcess
    log: Path

    def wait(self, timeout_s: float = 300.0) -> int:
        """The exit code; a run killed by signal n gives -n."""
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, f"still running: {self.output()}"
        return self.process.exitcode

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.join()

    def output(self) -> str:
        """What it has written to stdout and stderr so far."""
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """`start(argv, paths=(), hook="")` forks a run; paths go to the front of sys.path."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qirl_fast.train", "torch.utils.tensorboard"])
    logs = tmp_path_factory.mktemp("logs")
    started: list[Run] = []

    def fork(argv: Sequence[str], *, paths: Sequence[Path] = (), hook: str = "") -> Run:
        log = logs / f"{len(started)}.txt"
        names: dict[str, Any] = {
            "__name__": "run",
            "ARGV": [str(a) for a in argv],
            "LOG": str(log),
            "PATHS": [str(p) for p in paths],
            "HOOK": hook,
        }
        process = context.Process(target=exec, args=(CHILD, names), daemon=True)
        process.start()
        started.append(Run(process, log))
        return started[-1]

    return fork


@pytest.fixture
def restarted(small: Sequence[str], tmp_path: Path) -> Callable[[int, str, Sequence[str]], str]:
    """`restarted(count, source, settings)`: torchrun with one restart of a program of this source;
    what it said, when it has ended well.
    """

    def run(count: int, source: str, settings: Sequence[str]) -> str:
        node = tmp_path / "node.py"
        node.write_text(source)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        many = ["--nproc-per-node", str(count), "--max-restarts", "1", str(node)]
        done = subprocess.run(
            [*torchrun, *many, *small, *settings],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return run


# The n-th time that `name` of qirl_fast.`module` is called, `then` happens: after it, or before.
MEDDLES = """
import importlib, os, signal
owner = importlib.import_module("qirl_fast.{module}")
for part in {name!r}.split(".")[:-1]:
    owner = getattr(owner, part)
whole, left = getattr(owner, {name!r}.split(".")[-1]), [{n}]
def meddled(*arguments, **named):
    left[0] -= 1
    if left[0] == 0 and not {after}:
        {then}
    found = whole(*arguments, **named)
    if left[0] == 0 and {after}:
        {then}
    return found
setattr(owner, {name!r}.split(".")[-1], meddled)
"""


@pytest.fixture(scope="session")
def meddle() -> Callable[..., str]:
    """`meddle(where, n, then, after=True)`: a hook; where: "trainer.Trainer.rollout", then: one
    statement, in which `found` is what came back.
    """

    def hook(where: str, n: int, then: str, after: bool = True) -> str:
        parts = where.split(".")
        inner = next(i for i, part in enumerate(parts) if part[0].isupper() or i == len(parts) - 1)
        module, name = ".".join(parts[:inner]), ".".join(parts[inner:])
        return MEDDLES.format(module=module, name=name, n=n, then=then, after=after)

    return hook


@pytest.fixture(scope="session")
def small() -> tuple[str, ...]:
    """Settings of a run of a few seconds."""
    return SMALL


@pytest.fixture
def processes(start: Callable[..., Run], small: tuple[str, ...]) -> Callable[..., list[Run]]:
    """`processes(count, settings)` runs the small recipe, or one that the settings name first, in
    so many, to their end; hook: source that each runs before.
    """

    def run(
        count: int, settings: Sequence[str], paths: Sequence[Path] = (), hook: str = ""
    ) -> list[Run]:
        whole = [*small, *settings] if "=" in settings[0] else settings
        with environments(count) as told:
            first = [f"import os; os.environ.update({own})\n" for own in told]
            runs = [start(whole, paths=paths, hook=own + hook) for own in first]
            for one in runs:
                one.wait()
        return runs

    return run


@pytest.fixture(scope="session")
def finished(
    start: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`finished(name, *settings)` is the folder of a finished small run, made once a session."""
    output = tmp_path_factory.mktemp("finished")

    def make(name: str, *settings: str) -> Path:
        folder = output / name
        if not (folder / "summary.json").exists():
            run = start([*SMALL, f"output={output}", f"run={name}", *settings])
            assert run.wait() == 0, run.output()
        return folder

    return make


@pytest.fixture(scope="session")
def weights() -> Path:
    """The packaged model folder. Tests do not depend on how well it draws."""
    return WEIGHTS


@pytest.fixture
def make_model() -> Callable[..., QwenImage21]:
    """`make_model(dtype=torch.float32)` loads the packaged model anew."""
    return lambda dtype=torch.float32: QwenImage21.load(WEIGHTS, dtype)


@pytest.fixture(scope="session")
def frozen_model() -> QwenImage21:
    """The packaged model, shared by the tests that do not change it."""
    return QwenImage21.load(WEIGHTS, torch.float32)


@pytest.fixture(scope="session")
def stock_pipeline() -> Any:
    """The same folder through the stock pipeline's own loading."""
    from diffusers import QwenImage21Pipeline

    from qirl_fast.processor import QwenVLProcessor

    processor = QwenVLProcessor.from_pretrained(WEIGHTS / "processor")
    pipeline = QwenImage21Pipeline.from_pretrained(WEIGHTS, processor=processor)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def model_copy(tmp_path: Path) -> Path:
    """A copy of the packaged model folder, to be damaged."""
    return Path(shutil.copytree(WEIGHTS, tmp_path / "model"))


@pytest.fixture(scope="session")
def read_jsonl() -> Callable[[Path], list[dict[str, Any]]]:
    """Rows of a JSONL file."""
    return lambda path: [json.loads(line) for line in path.read_text().splitlines()]


class Toy(torch.nn.Module):
    """A model adapter of a few dozen parameters that meets the protocol of rollout/sample.py.

    v = tanh(x W + text U + sigma b) V, text the mean of a prompt's tokens; 6 tokens of 4 channels,
    any image size. `calls` counts the forwards, `rows` their rows.
    """

    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = {"w": (4, 8), "u": (5, 8), "b": (8,), "v": (8, 4)}
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[0] ** 0.5
            setattr(self, name, torch.nn.Parameter(value.to(dtype)))
        self.dtype = dtype
        self.calls = self.rows = 0
        self.untrained = [p.detach().clone() for p in self.parameters()]

    def latent_shape(self, height: int, width: int) -> tuple[int, int]:
        return 6, 4

    def prefix(
        self, embeddings: Sequence[Tensor], owner: Sequence[int], height: int, width: int
    ) -> Tensor:
        return torch.stack([embeddings[p].to(self.dtype).mean(0) for p in owner]) @ self.u

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first, second])

    def velocity(
        self, x: Tensor, sigma: Sequence[float], prefix: Tensor, exact: bool = True
    ) -> Tensor:
        self.calls += 1
        self.rows += len(x)
        by_row = torch.as_tensor(sigma, dtype=self.dtype).repeat_interleave(len(x) // len(sigma))
        noise_level = by_row[:, None, None] * self.b
        return torch.tanh(x.to(self.dtype) @ self.w + prefix[:, None] + noise_level) @ self.v

    def gathered(self) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def reference(self) -> Iterator[None]:
        own = [p.data for p in self.parameters()]
        for p, data in zip(self.parameters(), self.untrained, strict=True):
            p.data = data
        yield
        for p, data in zip(self.parameters(), own, strict=True):
            p.data = data


@pytest.fixture
def make_toy() -> type[Toy]:
    """`make_toy(dtype, seed)`: see Toy."""
    return Toy


@pytest.fixture(scope="session")
def toy_text() -> tuple[list[Tensor], Tensor]:
    """Embeddings of three prompts for Toy, of different lengths, and the unconditional one."""
    generator = torch.Generator().manual_seed(9)
    lengths = (3, 5, 4, 1)
    *text, null = [torch.randn(length, 5, generator=generator) for length in lengths]
    return text, null


PROMPTS = (
    "a photo of a red circle",
    "a photo of two blue squares",
    "a photo of a green triangle left of a yellow circle",
    "a photo of a square",
)


@pytest.fixture(scope="session")
def prompts() -> tuple[str, ...]:
    """Prompts of different token counts, the first two of equal count or not as the BPE has it."""
    return PROMPTS


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A test of the chaos suite tells the table what it was about."""
    outcome: Any = yield
    for mark in item.iter_markers("chaos"):
        outcome.get_result().user_properties.append(("chaos", mark.args[0]))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """With -m chaos: what was done to the runs, how often, and whether each of them bore it."""
    if "chaos" not in config.option.markexpr.split():
        return
    rows: dict[str, list[Any]] = {}
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            for name, what in getattr(report, "user_properties", ()):
                if name == "chaos" and (report.when == "call" or outcome != "passed"):
                    rows.setdefault(what, []).append(report)
    terminalreporter.section("chaos")
    for what, reports in sorted(rows.items()):
        held = sum(r.outcome == "passed" for r in reports)
        left = sum(r.outcome == "skipped" for r in reports)
        said = "held" if held + left == len(reports) else "DID NOT HOLD"
        skipped = f", {left} left out" if left else ""
        seconds = sum(r.duration for r in reports)
        terminalreporter.line(f"{said:12} {held:3} times{skipped} {seconds:7.1f} s  {what}")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; skipped where it or playwright is missing (.ci/run installs both)."""
    sync = pytest.importorskip("playwright.sync_api", reason="pip install 'qirl-fast[arena-test]'")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium; on Debian: apt-get install -y chromium")
    with sync.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()
