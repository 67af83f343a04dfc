"""What a run keeps of its held-out prompts: before, after, and small pictures on the way.

    samples/before.npz    of each prompt the score by each judge (`score_<judge>`, float64 [P]),
                          the first image (`image_<i>`, uint8 [h, w, 3], no side over KEPT_SIDE
                          pixels) and, of an edit, what is edited (`source_<i>`, no side over
                          STRIP_SIDE); ids (`prompts`), texts and categories (`rows`, JSON as
                          bytes); of the first GRID_PICTURES images the `gridness` they were drawn
                          with (float64), which a smaller picture no longer has
    samples/after.npz     the same without sources, and `update`, after which it was taken
    samples/strip-<N>.npz the first STRIP prompts as drawn after update N (`image_<i>`), from the
                          noise they have in the others; small, not judged

Every file appears whole or not at all.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qirl_fast.config import Config, ConfigError
from qirl_fast.data.prompts import Prompt
from qirl_fast.evaluation.grid import before_after_grid
from qirl_fast.evaluation.gridness import gridness
from qirl_fast.evaluation.heldout import Evaluation
from qirl_fast.heldout_samples import EvaluationFailed
from qirl_fast.reporting.checks import GRID_PICTURES
from qirl_fast.tracking import Tracker
from qirl_fast.trainer import Trainer

GRID = 16  # prompts in a picture
STRIP = 8  # prompts in a strip
STRIP_SIDE = 256  # pixels of its images' longer side, at most
KEPT_SIDE = 512  # and of those before and after: as large as report.html shows any


def before_evaluation(trainer: Trainer, run_dir: Path) -> Evaluation:
    """The untrained policy on the held-out prompts; kept in the run folder for resuming.

    Process 0 reads and writes it; what the others get is for nobody.
    """
    path, world = run_dir / "samples" / "before.npz", trainer.world
    ids = np.array([p.id for p in trainer.heldout])
    with world.agreed():
        kept = _kept(trainer, path, ids, run_dir) if world.rank == 0 else None
    if world.gather(kept is not None)[0]:
        return kept or Evaluation({}, [])
    with trainer.model.reference():
        before = trainer.evaluate_weights()
    if world.rank == 0:
        sources = trainer.conditioning.sources(trainer.heldout) or []
        edited = [i for i, prompt in enumerate(trainer.heldout) if prompt.images]
        more = {f"source_{i}": small(sources[i], STRIP_SIDE) for i in edited}
        keep(path, before, trainer.heldout, more)
        return _kept(trainer, path, ids, run_dir) or before  # as a resumed run has it
    return before


def keep_after(trainer: Trainer, run_dir: Path, after: Evaluation) -> None:
    """Write samples/after.npz."""
    update = np.array(trainer.cfg.train.steps)
    keep(run_dir / "samples" / "after.npz", after, trainer.heldout, {"update": update})


def keep(
    path: Path, found: Evaluation, prompts: Sequence[Prompt], more: dict[str, np.ndarray]
) -> None:
    """Write an evaluation, and what else belongs to it, as .npz."""
    rows = json.dumps([{"prompt": p.prompt, "category": p.category} for p in prompts])
    arrays: dict[str, Any] = {f"score_{name}": values for name, values in found.scores.items()}
    arrays |= {f"image_{i}": small(image, KEPT_SIDE) for i, image in enumerate(found.images)}
    arrays |= {"gridness": np.array([gridness(image) for image in found.images[:GRID_PICTURES]])}
    arrays |= {"prompts": np.array([p.id for p in prompts])}
    _write(path, arrays | {"rows": np.frombuffer(rows.encode(), np.uint8)} | more)


def _write(path: Path, arrays: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    beside = path.with_name(f".{path.name}")
    np.savez(beside, **arrays)
    beside.replace(path)


def small(image: np.ndarray, side: int) -> np.ndarray:
    """The image with no side over `side`, uint8 [h, w, 3]."""
    if max(image.shape[:2]) <= side:
        return image
    picture = Image.fromarray(image)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def _kept(trainer: Trainer, path: Path, ids: np.ndarray, run_dir: Path) -> Evaluation | None:
    """The evaluation in this file, of prompts of these ids; None without a file."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as saved:
        if not np.array_equal(saved["prompts"], ids):
            raise ConfigError(
                [
                    f"data.heldout: {trainer.cfg.data.heldout} has changed since {run_dir} was "
                    "begun, and before and after are compared on the same prompts; put the "
                    "file back, or start anew under run=NAME"
                ]
            )
        scores = {n.removeprefix("score_"): saved[n] for n in saved if n.startswith("score_")}
        # One array, in runs begun before images could differ in size.
        own = saved.get("images", ())
        images = list(own) or [saved[f"image_{i}"] for i in range(len(ids))]
        return Evaluation(scores, images)


def strip_updates(cfg: Config) -> set[int]:
    """Updates after which a strip is drawn: `tracking.strips` of them evenly between before and
    after, as many as there are.
    """
    parts, steps = cfg.tracking.strips + 1, cfg.train.steps
    return {round(steps * k / parts) for k in range(1, parts)} - {0, steps}


def draw_strip(trainer: Trainer, tracker: Tracker, run_dir: Path, update: int) -> None:
    """samples/strip-N.npz: the first held-out prompts as the policy draws them now.

    One that cannot be drawn is said and left out: if the weights are to blame, the next step stops
    the run and says more.
    """
    try:
        images = trainer.strip(STRIP)
    except EvaluationFailed as error:
        tracker.say(f"no pictures of update {update} for report.html: {error}")
        return
    if trainer.world.rank == 0:
        arrays = {f"image_{i}": small(image, STRIP_SIDE) for i, image in enumerate(images)}
        _write(run_dir / "samples" / f"strip-{update}.npz", arrays)


def draw_samples(trainer: Trainer, run_dir: Path, update: int) -> None:
    """samples/step-N.png: before and now, the same prompts and seeds all through the run."""
    before, now = before_evaluation(trainer, run_dir), trainer.evaluate(GRID)
    if trainer.world.rank == 0:
        picture = run_dir / "samples" / f"step-{update}.png"
        draw_grid(trainer, before, now, picture, list(range(GRID)))


def draw_grid(
    trainer: Trainer, before: Evaluation, after: Evaluation, path: Path, order: list[int]
) -> None:
    """Held-out prompts of these numbers, as many as are there, before and after, as PNG."""
    order = [i for i in order if i < len(after.images)]
    before_after_grid(
        [before.images[i] for i in order],
        [after.images[i] for i in order],
        [trainer.heldout[i].prompt for i in order],
        [(_shown(before, i), _shown(after, i)) for i in order],
        path,
        trainer.conditioning.sources([trainer.heldout[i] for i in order]),
    )


def _shown(evaluation: Evaluation, i: int) -> float:
    """A prompt's score by the first judge that has one; NaN without."""
    found = [float(scores[i]) for scores in evaluation.scores.values()]
    return next((score for score in found if np.isfinite(score)), float("nan"))
