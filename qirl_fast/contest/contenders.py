"""The models of an evaluation: which files they are, what they were trained on, and that they fit.

An adapter is a PEFT folder, or a run or checkpoint of qirl_fast.train, whose recipe then also says
what the model was trained on: its prompts and, where it was distilled, its teachers'.
"""

from __future__ import annotations

import hashlib
import json
import platform
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from qirl_fast.config import ConfigError
from qirl_fast.config.evaluate import ContenderConfig, EvaluateConfig
from qirl_fast.config.files import model_folder_problems
from qirl_fast.data.embeddings import TEXT_PARTS, fingerprint
from qirl_fast.models import adapter_of
from qirl_fast.models.loading import described_model
from qirl_fast.models.teachers import add_lora, is_lora
from qirl_fast.tiny import packaged

RECIPE = "config.resolved.yaml"
LORA = Path("checkpoints", "latest", "lora")
DRAWN = (*TEXT_PARTS, "transformer", "vae", "scheduler")  # parts that decide an image
FORMAT = 1  # of what is drawn from the same weights and settings


@dataclass(frozen=True)
class Contender:
    """One model. folder: its base. adapter: a PEFT folder on it, None: the base itself.

    recipe: of the run that made the adapter, {} where that is not known. weights: SHA-256 of base
    and adapter. home: the folder that recipe lies in.
    """

    name: str
    folder: Path
    adapter: Path | None
    guidance: float
    steps: int
    weights: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    home: Path | None = None

    def described(self) -> dict[str, Any]:
        """For evaluation.json."""
        adapter = None if self.adapter is None else str(self.adapter)
        own = {"base": str(self.folder), "adapter": adapter, "weights": self.weights}
        return own | {"guidance": self.guidance, "steps": self.steps}


def contenders(cfg: EvaluateConfig) -> list[Contender]:
    """The models of the settings, in order. ConfigError, with a line a problem, where one is no
    model, or its adapter does not fit it.
    """
    found, problems = [], []
    bases: dict[Path, str] = {}
    for name, own in cfg.models.items():
        try:
            folder = packaged(cfg.base if own.path == "base" else own.path)
            if lines := model_folder_problems(folder):
                raise ConfigError([f"path: {line}" for line in lines])
            adapter = None if own.adapter is None else _adapter(cfg, own, folder)
            if folder not in bases:
                bases[folder] = fingerprint(folder, DRAWN)
            found.append(_contender(cfg, name, folder, adapter, bases[folder]))
        except ConfigError as error:
            problems += [f"models.{name}.{line}" for line in error.problems]
        except (ValueError, OSError) as error:
            problems.append(f"models.{name}: {error}")
    if problems:
        raise ConfigError(problems)
    return found


def _contender(
    cfg: EvaluateConfig, name: str, folder: Path, adapter: Path | None, base: str
) -> Contender:
    own = cfg.models[name]
    home, weights = None, base
    if adapter is not None:
        _check_fit(folder, adapter, name)
        home = next((p for p in adapter.absolute().parents[:3] if (p / RECIPE).is_file()), None)
        files = [adapter / name for name in ("adapter_config.json", "adapter_model.safetensors")]
        parts = [base.encode(), *(hashlib.sha256(file.read_bytes()).digest() for file in files)]
        weights = hashlib.sha256(b" ".join(parts)).hexdigest()
    return Contender(
        name,
        folder,
        adapter,
        cfg.guidance if own.guidance is None else own.guidance,
        own.steps or cfg.steps,
        weights,
        {} if home is None else recipe_of(home),
        home,
    )


def _adapter(cfg: EvaluateConfig, own: ContenderConfig, base: Path) -> Path:
    """The PEFT folder that the settings name. ConfigError where they name none."""
    assert own.adapter is not None
    if own.adapter == "last":
        return _last(cfg, base)
    folder = Path(own.adapter)
    for place in (folder, folder / "lora", folder / LORA):
        if is_lora(place):
            if not (place / "adapter_model.safetensors").is_file():
                line = f"half an adapter: {place} lacks adapter_model.safetensors"
                raise ConfigError([f"adapter: {line}"])
            return place
    if (folder / RECIPE).is_file() and _text(recipe_of(folder), "model", "adapter") == "full":
        mend = f"python -m qirl_fast.export {folder} FOLDER, and name that as path"
        raise ConfigError([f"adapter: {folder} trained all weights; make a model of it: {mend}"])
    wanted = "a PEFT folder (adapter_config.json), a run of qirl_fast.train, or 'last'"
    raise ConfigError([f"adapter: {own.adapter!r} is no adapter, nor holds one; wanted {wanted}"])


def _last(cfg: EvaluateConfig, base: Path) -> Path:
    """The newest run that held out these prompts, of this base."""
    fitting = [
        path
        for recipe in Path(cfg.runs).glob(f"*/{RECIPE}")
        if is_lora(path := recipe.parent / LORA)
        and (found := recipe_of(recipe.parent))
        and packaged(_text(found, "data", "heldout")) == packaged(cfg.prompts)
        and packaged(_text(found, "model", "path")) == base
    ]
    if not fitting:
        raise ConfigError(
            [
                f"adapter: no run in {cfg.runs}/ has a LoRA of {base} and held out {cfg.prompts}; "
                "train one first (make train), or name another folder of runs"
            ]
        )
    return max(fitting, key=lambda path: (path.resolve().stat().st_mtime_ns, str(path)))


def _check_fit(folder: Path, adapter: Path, name: str) -> None:
    """ValueError, naming both, for an adapter that is not of this base; no weights are loaded."""
    kind = adapter_of(folder, "auto").parts["transformer"]
    transformer = described_model(kind, folder / "transformer")
    with warnings.catch_warnings():  # that nothing is copied into weights without memory
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        add_lora(transformer, adapter, "fits", f"the adapter of {name!r}")


def recipe_of(run: Path) -> dict[str, Any]:
    """A run's resolved recipe. ConfigError for one that cannot be read."""
    try:
        found = yaml.safe_load((run / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError([f"{run / RECIPE}: cannot be read: {error}"]) from error
    return found if isinstance(found, dict) else {}


def size_of(cfg: EvaluateConfig, models: list[Contender]) -> tuple[int, int]:
    """(height, width) at which all models draw: the settings', else that of the adapters' runs.

    ConfigError, naming both sides, where two runs drew at different sizes; images of different
    size are not comparable.
    """
    if cfg.height is not None and cfg.width is not None:
        return cfg.height, cfg.width
    sizes: dict[tuple[int, int], str] = {}
    for model in models:
        rollout = model.recipe.get("rollout")
        if isinstance(rollout, Mapping) and {"height", "width"} <= rollout.keys():
            sizes.setdefault((int(rollout["height"]), int(rollout["width"])), model.name)
    if len(sizes) == 1:
        return next(iter(sizes))
    if not sizes:
        wanted = "no adapter's run says at which size it drew; set height and width"
        raise ConfigError([f"height, width: {wanted}"])
    drew = ", ".join(f"{name!r} was trained at {h} x {w}" for (h, w), name in sizes.items())
    raise ConfigError(
        [
            f"height, width: {drew} (height x width), and images of different size are not "
            "comparable; set the one size at which all are to draw"
        ]
    )


def image_key(model: Contender, how: Mapping[str, Any]) -> str:
    """Names all that decides a model's images beside the prompts: weights, sampling, processor."""
    plain = {"format": FORMAT, "weights": model.weights, "guidance": model.guidance}
    plain |= {"steps": model.steps, "machine": platform.machine(), **how}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def training_files(model: Contender) -> dict[str, tuple[str, str | None]]:
    """What a model was trained on, by a name for it: (prompts, folder of their images or None)."""
    if model.home is None:
        return {}
    return dict(_files(model.home, model.recipe, set()))


def _files(
    home: Path, recipe: Mapping[str, Any], seen: set[Path]
) -> Iterator[tuple[str, tuple[str, str | None]]]:
    if home in seen:
        return
    seen.add(home)
    train = _text(recipe, "data", "train")
    if train:
        yield f"{train} ({home.name})", (train, _text(recipe, "data", "images") or None)
    algorithm = recipe.get("algorithm")
    teachers = algorithm.get("teachers") if isinstance(algorithm, Mapping) else None
    for teacher in teachers.values() if isinstance(teachers, Mapping) else ():
        path = teacher.get("path") if isinstance(teacher, Mapping) else None
        places = Path(path).absolute().parents[:3] if isinstance(path, str) else ()
        for place in places:
            if (place / RECIPE).is_file():
                yield from _files(place, recipe_of(place), seen)
                break


def _text(recipe: Mapping[str, Any], section: str, key: str) -> str:
    inner = recipe.get(section)
    value = inner.get(key) if isinstance(inner, Mapping) else None
    return value if isinstance(value, str) else ""
