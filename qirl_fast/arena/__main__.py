"""`python -m qirl_fast.arena`: blind votes between models, side by side, in the browser.

  python -m qirl_fast.arena SETTINGS.yaml [key=value ...]          serve the page
  python -m qirl_fast.arena FOLDER [key=value ...]                 the same of what `make evaluate`
                                                                   or `make pipeline` has left
  python -m qirl_fast.arena export PIPELINE OUT [MODEL ...]        other models of a pipeline
  python -m qirl_fast.arena judge SETTINGS.yaml judge=NAME         let a judge vote, kept apart
  python -m qirl_fast.arena results SETTINGS.yaml                  print what the votes say
  python -m qirl_fast.arena plan                                   how many prompts a study needs

Settings: models: {base: FOLDER, rl: FOLDER}, each with prompts.jsonl; docs/arena.md has the rest.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from qirl_fast.arena.export import export
from qirl_fast.arena.judging import judge_all
from qirl_fast.arena.report import as_text, report
from qirl_fast.arena.server import opened, serve
from qirl_fast.arena.store import StoreError
from qirl_fast.arena.study import Study, load_study
from qirl_fast.config import ConfigError, load_settings
from qirl_fast.config.arena import ArenaConfig
from qirl_fast.entry import run
from qirl_fast.evaluation.win_share import needed

SHARES = (0.55, 0.6, 0.65, 0.7, 0.75, 0.8)
TIES = (0.0, 0.2, 0.4)
MOST = 3000


def main(argv: list[str] | None = None) -> int:
    """Entry point: 0 done, 1 a judge could not judge everything, 2 the settings are wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    return run(argv, __doc__, _work, wrong=(ConfigError, StoreError))


def _work(args: list[str]) -> int:
    if not args:
        print(__doc__)
        return 2
    word, rest = args[0], args[1:]
    if word == "export":
        if len(rest) < 2:
            raise ConfigError(["export: wanted the pipeline's folder and a new one"])
        path = export(Path(rest[0]), Path(rest[1]), rest[2:])
        print(f"python -m qirl_fast.arena {path}")
        return 0
    if word == "plan":
        _plan()
        return 0
    if word in ("judge", "results"):
        cfg, study = _load(rest)
        store = opened(cfg, study)
        try:
            if word == "judge":
                cast, not_judged = judge_all(cfg, study, store)
                print(f"{cast} votes of the judge; {not_judged} questions it could not judge")
                return int(not_judged > 0)
            for model in study.models[1:]:
                print(as_text(report(cfg, study, store, model, study.models[0])))
        finally:
            store.close()
        return 0
    return serve(*_load(args))


def _load(args: Sequence[str]) -> tuple[ArenaConfig, Study]:
    """The settings, or those that lie in a folder, and the study that they name."""
    words = list(args)
    if words and Path(words[0]).is_dir():
        settings = Path(words[0]) / "arena" / "arena.yaml"
        words[0] = str(settings if settings.exists() else export(Path(words[0]), settings.parent))
    cfg = load_settings(words, ArenaConfig)
    study = load_study(cfg.models, cfg.sizes)
    for note in study.notes:
        print(f"note: {note}", file=sys.stderr)
    return cfg, study


def _plan() -> None:
    """Prompts, one vote each, by which 80 % of simulated studies exclude no difference."""
    print("prompts by which 80 % of 1000 simulated studies exclude 'no difference', 95 % interval")
    print("true share  " + "".join(f"{100 * t:5.0f} % ties" for t in TIES))
    for share in SHARES:
        cells = [needed(share, ties, most=MOST) for ties in TIES]
        said = [f"over {MOST}" if c > MOST else f"{c:.0f}" for c in cells]
        print(f"{100 * share:8.0f} %  " + "".join(f"{text:>12}" for text in said))


if __name__ == "__main__":
    sys.exit(main())
