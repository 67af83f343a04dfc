"""The folder of a run, and traces of single steps in it.

<output>/<run>/config.resolved.yaml  the whole recipe
               metrics.jsonl         one JSON object a step: numbers only, equal bit for bit in
                                     runs that compute the same
               timings.jsonl         the clock: seconds by phase, images/s, memory, MFU, the
                                     judges' queue; other every time
               log.txt               backends chosen, graphs recorded, checkpoints skipped
               tb/  samples/  checkpoints/  summary.json
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from qirl_fast.config import Config, ConfigError, refuse_changes, save_resolved
from qirl_fast.config.files import make_folder
from qirl_fast.config.reward import RewardConfig

RESOLVED = "config.resolved.yaml"
FOLDERS = ("tb", "samples", "checkpoints")


def prepare_run_dir(cfg: Config | RewardConfig) -> Path:
    """Make <output>/<run> and write the resolved recipe into it; return the folder.

    A folder that already holds a run is taken only when resuming (resume 'auto' or a path), and
    only under the recipe it was made with (`changes`).
    Raises ConfigError, with how to mend it, if it is not, or cannot be written.
    """
    assert cfg.run is not None, "load_config fills in run"
    run_dir = Path(cfg.output) / cfg.run
    make_folder(run_dir)
    if cfg.resume == "never" and any(run_dir.iterdir()):
        raise ConfigError(
            [
                f"run: {run_dir} already holds a run; go on with it by resume=auto, choose "
                "another name by run=NAME, or remove the folder"
            ]
        )
    for name in FOLDERS:
        make_folder(run_dir / name)
    if (run_dir / RESOLVED).exists():
        old: Any = OmegaConf.to_container(OmegaConf.load(run_dir / RESOLVED))
        refuse_changes(old, cfg, str(run_dir))
    save_resolved(cfg, run_dir / RESOLVED)
    return run_dir


@contextmanager
def profiled(run_dir: Path, update: int, wanted: Sequence[int]) -> Iterator[None]:
    """Write profile/step-N.json.gz, a trace of all that is done inside, of the updates `wanted`.

    Open it at ui.perfetto.dev or chrome://tracing.
    """
    if update not in wanted:
        yield
        return
    from torch import profiler
    from torch._C._profiler import _ExperimentalConfig

    threads = _ExperimentalConfig(profile_all_threads=True)  # chunks are worked on by several
    with profiler.profile(record_shapes=True, experimental_config=threads) as trace:
        yield
    folder = run_dir / "profile"
    folder.mkdir(exist_ok=True)
    trace.export_chrome_trace(str(folder / f"step-{update}.json.gz"))
