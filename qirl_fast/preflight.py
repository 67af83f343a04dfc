"""What only shows beside the model and the prompt files, checked before anything is computed.

`load_config` checks a recipe by itself. Here its sizes meet the model's, and every prompt row the
judges that will score it: a row that a judge cannot score would otherwise drop its whole group,
update after update. All problems are reported together.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qirl_fast.conditioning import Conditioning, condition_versions
from qirl_fast.config import Config, ConfigError
from qirl_fast.data.embeddings import TEXT_PARTS
from qirl_fast.data.images import ImageError
from qirl_fast.data.prompts import Prompt
from qirl_fast.distributed import World
from qirl_fast.models import Model, adapter_of
from qirl_fast.models.sequence import Ulysses
from qirl_fast.models.sharding import Sharding
from qirl_fast.rewards.judge import SOURCES, Row, Sources
from qirl_fast.rewards.judges import Judges
from qirl_fast.rollout.dynamics import step_coefficients
from qirl_fast.rollout.schedule import make_sigmas
from qirl_fast.tiny import packaged

SHOWN = 10  # bad images named in an error
SHARED = {"text encoder": TEXT_PARTS, "autoencoder": ("vae",), "scheduler": ("scheduler",)}
BLANK = np.zeros((64, 64, 3), np.uint8)  # in place of condition images, which no row check reads

log = logging.getLogger(__name__)


def sharding(cfg: Config, world: World, device: str) -> Sharding | None:
    """All: over whom the transformer is spread, None where it is not.

    ValueError where it cannot be; device: "cpu" or "cuda".
    """
    shard, offload = cfg.processes.shard, cfg.processes.offload
    if shard == 1:
        return None
    if world.size == 1 or world.size % (shard or world.size):
        raise ValueError(
            f"processes.shard: got {shard or '0 (all)'} with {world.size} processes; wanted "
            "several, a multiple of it (torchrun --nproc-per-node N), or processes.shard=1"
        )
    if offload and device == "cpu":
        raise ValueError(
            "processes.offload: got true, and on a CPU all weights are in its memory; set it to "
            "false"
        )
    adapter = adapter_of(packaged(cfg.model.path), cfg.model.family)
    if not adapter.shards:
        raise ValueError(
            f"processes.shard: got {shard}, and the family {adapter.family} cannot be spread; set "
            "processes.shard=1"
        )
    return Sharding(world.mesh(shard, device), offload)


def sharing_tokens(cfg: Config, world: World, model: Model) -> Ulysses | None:
    """All: who shares the tokens of a sample with this process, None where nobody does.

    ConfigError where the model cannot.
    """
    size = cfg.processes.sequence
    require_sharing(size, type(model), model.transformer.config)
    if size == 1:
        return None
    return Ulysses(world.place, size, world.neighbours(cfg.processes.timeout_s))


def require_sharing(size: int, adapter: type[Model], config: Any) -> None:
    """ConfigError where so many processes cannot share the tokens of a sample.

    config: the transformer's.
    """
    if size == 1:
        return
    if not adapter.splits:
        raise ConfigError(
            [
                f"processes.sequence: got {size}, and the family {adapter.family} does not share "
                "out its tokens; set processes.sequence=1"
            ]
        )
    heads = config.num_attention_heads
    if heads % size:
        allowed = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ConfigError(
            [
                f"processes.sequence: got {size}, and each process gets as many of the {heads} "
                f"heads; allowed: {allowed}"
            ]
        )


def preflight(
    cfg: Config,
    model: Model,
    judges: Judges,
    scheduler_config: Mapping[str, Any],
    conditioning: Conditioning,
    prompts: Mapping[str, list[Prompt]],
    files: Mapping[str, Path],
) -> dict[str, set[int]]:
    """The rows to leave out, by number; ConfigError with one line per problem.

    prompts, files: "train" and "heldout", the rows and where they were read from. Rows whose
    images cannot be used are problems, or left out, as data.bad_images says.
    """
    bad: dict[str, dict[int, ImageError]] = {"train": {}, "heldout": {}}
    if model.takes_images():
        bad = {name: _bad_images(cfg, conditioning, name, rows) for name, rows in prompts.items()}
    skip = cfg.data.bad_images == "skip"
    have = {name: len(rows) - len(bad[name]) * skip for name, rows in prompts.items()}
    problems = [*_size_problems(cfg, model, scheduler_config), *_count_problems(cfg, have)]
    problems += _task_problems(cfg, prompts["train"], files["train"])
    problems += _model_problems(cfg, packaged(cfg.model.path))
    for name, rows in prompts.items():
        problems += row_problems(cfg, judges, rows, bad[name], files[name])
        problems += _image_problems(cfg, model, rows, bad[name], files[name])
    if problems:
        raise ConfigError(problems)
    for name, faults in bad.items():
        for i, fault in faults.items():
            log.warning("%s: row %d is left out: %s", files[name], i + 1, fault)
    return {name: set(faults) for name, faults in bad.items()}


def _bad_images(
    cfg: Config, conditioning: Conditioning, name: str, rows: list[Prompt]
) -> dict[int, ImageError]:
    """The rows with an image that is refused, by number.

    Those that the evaluation would use are decoded, the others' headers are read.
    """
    bad: dict[int, ImageError] = {}
    room = cfg.evaluation.prompts if name == "heldout" else 0
    conditioning.prefetch(rows[:room])
    for i, row in enumerate(rows):
        try:
            condition_versions(cfg, conditioning.model, row)
        except ImageError as error:
            bad[i] = error
            continue
        if room:
            faults = conditioning.faults([row])
            if faults:
                bad[i] = faults[0]
            else:
                room -= 1
    return bad


def _image_problems(
    cfg: Config, model: Model, rows: list[Prompt], bad: Mapping[int, ImageError], file: Path
) -> Iterator[str]:
    """What is wrong with condition images: the first that are refused, or that there are any."""
    numbers = {bool(row.images): n for n, row in reversed(list(enumerate(rows, start=1)))}
    if True in numbers and not model.takes_images():
        yield (
            f"{file}: row {numbers[True]} has a condition image, and {cfg.model.path} draws from "
            "text alone; wanted an editing model, or rows without images"
        )
    elif False in numbers and model.needs_images:
        yield (
            f"{file}: row {numbers[False]} has no condition image, and {cfg.model.path} only edits "
            "images; wanted an image in every row"
        )
    elif cfg.data.bad_images == "stop" and bad:
        for i, fault in list(bad.items())[:SHOWN]:
            yield f"{file}: row {i + 1}: {fault}"
        more = f" (and {len(bad) - SHOWN} more)" if len(bad) > SHOWN else ""
        yield (
            f"{file}: {len(bad)} of {len(rows)} rows have an image that cannot be used{more}; mend "
            "them, or leave them out with data.bad_images=skip"
        )


def _size_problems(cfg: Config, model: Model, scheduler_config: Mapping[str, Any]) -> Iterator[str]:
    sizes = [("rollout.height, rollout.width", (cfg.rollout.height, cfg.rollout.width))]
    sizes += [("data.buckets", size) for size in cfg.data.buckets or ()]
    for key, size in sizes:
        try:
            tokens, _ = model.latent_shape(*size)
        except ValueError as error:
            yield f"{key}: {error}"
            continue
        problem = next(_step_problems(cfg, tokens, scheduler_config), None)
        if problem is not None:
            yield problem if key != "data.buckets" else f"data.buckets {list(size)}: {problem}"


def _step_problems(cfg: Config, tokens: int, scheduler_config: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the noise levels of an image of so many tokens."""
    for key, steps in (("rollout", cfg.rollout.steps), ("evaluation", cfg.evaluation.steps)):
        try:
            make_sigmas(steps, tokens, scheduler_config)
        except ValueError as error:
            yield f"{key}.steps: {error}"
            return
    yield from _dynamics_problems(cfg, make_sigmas(cfg.rollout.steps, tokens, scheduler_config))


def _dynamics_problems(cfg: Config, sigmas: np.ndarray) -> Iterator[str]:
    """The first step that may be trained and whose coefficients are out of range."""
    r = cfg.rollout
    drawn = r.sde_steps.high if r.sde_steps else None
    first, last = 0, drawn or r.steps - 1
    if r.window:
        first, last = r.window.start, r.window.start + r.window.size
    for i in range(first, last):
        try:
            step_coefficients(
                r.dynamics,
                float(sigmas[i]),
                float(sigmas[i + 1]),
                eta=r.eta,
                sigma_max=float(sigmas[1]),
            )
        except ValueError as error:
            yield f"rollout.eta: step {i}: {error}"
            return


def _count_problems(cfg: Config, usable: Mapping[str, int]) -> Iterator[str]:
    have, want = usable["heldout"], cfg.evaluation.prompts
    if not 2 <= want <= have:
        yield (
            f"evaluation.prompts: got {want}; {cfg.data.heldout} has {have}, and an interval needs "
            f"two: allowed: 2 to {have}"
        )
    have, want = usable["train"], cfg.data.prompts_per_step
    if want > have:
        yield (
            f"data.prompts_per_step: got {want}; {cfg.data.train} has {have}, and no prompt comes "
            f"twice in a batch: allowed: 1 to {have}"
        )


def _task_problems(cfg: Config, rows: list[Prompt], file: Path) -> Iterator[str]:
    """The first row whose task the algorithm knows nothing of."""
    known = cfg.algorithm.tasks
    for number, row in enumerate(rows, start=1):
        if known is not None and row.task not in known:
            yield (
                f"{file}:{number}: the row's task is {row.task!r}, and {cfg.algorithm.name} has "
                f"someone to answer for {', '.join(sorted(known))} alone; name the task under one "
                "of algorithm.teachers, or take such rows out"
            )
            return


def _model_problems(cfg: Config, folder: Path) -> Iterator[str]:
    """Where a model that answers beside the trained one would see or draw something else."""
    for who, other in cfg.algorithm.models.items():
        for what, parts in SHARED.items():
            if contents(folder, parts) != contents(other, parts):
                yield (
                    f"algorithm: {who} ({other}) has another {what} than {folder}; both must see "
                    "the same prompts and draw the same latents at the same noise levels: wanted a "
                    "model made from the same base"
                )


def contents(folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """By file what decides what these parts of a model folder compute: a config without the
    versions and paths that the libraries note in it, the SHA-256 of any other file.
    """
    found: dict[str, Any] = {}
    for part in parts:
        for file in sorted((folder / part).glob("*")):
            name = f"{part}/{file.name}"
            if file.name.endswith("config.json"):
                plain = json.loads(file.read_text(encoding="utf-8"))
                found[name] = {
                    k: v for k, v in plain.items() if k[0] != "_" and not k.endswith("_version")
                }
            else:
                with file.open("rb") as data:
                    found[name] = hashlib.file_digest(data, "sha256").hexdigest()
    return found


def row_problems(
    cfg: Config,
    judges: Judges,
    rows: list[Prompt],
    bad: Mapping[int, ImageError],
    file: Path,
) -> Iterator[str]:
    """The first row of the file that a judge refuses, for each judge."""
    refused: set[str] = set()
    usable = [i for i in range(len(rows)) if i not in bad]
    seen = [_judged(rows[i]) for i in usable]
    for i, row in zip(usable, seen, strict=True):
        weights = cfg.category_weights.get(rows[i].category or "", cfg.rewards)
        for judge, fault in judges.check_row(row, weights):
            if judge not in refused:
                refused.add(judge)
                yield f"{file}:{i + 1}: judge {judge!r} cannot score this row: {fault}"
    for judge, fault in judges.useless(seen):
        if judge not in refused:
            yield f"{file}: judge {judge!r} can score none of these rows; the first: {fault}"


def _judged(row: Prompt) -> Row:
    """What a row check reads of a row."""
    return row.metadata | ({SOURCES: Sources([BLANK] * len(row.images))} if row.images else {})
