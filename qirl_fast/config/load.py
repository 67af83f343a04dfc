"""Read a recipe: YAML plus dotted overrides (OmegaConf), checked whole (pydantic).

Every problem is found before anything is computed and all are reported together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError  # type: ignore[import-untyped]

from qirl_fast import configs_dir
from qirl_fast.config.files import missing_files
from qirl_fast.config.rules import CrossError
from qirl_fast.config.schema import Config
from qirl_fast.config.wording import ConfigError, Schema, accepted_types, schema_of
from qirl_fast.rewards.judges import JUDGES, MONITORS, resolve

S = TypeVar("S", bound=BaseModel)


def default_recipe() -> Path:
    """Return the packaged recipe: installed beside the package, or in the checkout's configs/."""
    recipe = configs_dir() / "tiny_grpo.yaml"
    if not recipe.is_file():
        raise ConfigError([f"the packaged recipe {recipe} is missing; reinstall the package"])
    return recipe


def load_config(argv: Sequence[str]) -> Config:
    """Read and check a recipe.

    argv: at most one .yaml file (default: the packaged recipe) and any number of dotted overrides
    `key=value`, in the order of a command line; values are YAML, and a section given as
    `{key: value}` is merged.
    Returns the frozen Config with `run` filled in and weights scaled to sum to 1.
    Raises ConfigError naming every problem: unknown keys with the nearest valid one, wrong types
    and ranges, settings that contradict each other, unknown judges, missing files.
    """
    raw, recipe = _read(argv, schema_of(Config), default_recipe())
    spare: Any = OmegaConf.to_container(OmegaConf.load(default_recipe()))
    cfg, problems = _validate(raw, Config, spare)
    plain = raw if cfg is None else cfg.model_dump()
    problems += _judge_problems(plain)
    problems += missing_files(plain)
    if problems or cfg is None:
        raise ConfigError(problems)
    update: dict[str, Any] = {
        "rewards": _to_unit_sum(cfg.rewards),
        "category_weights": {c: _to_unit_sum(w) for c, w in cfg.category_weights.items()},
    }
    if cfg.run is None:
        update["run"] = f"{recipe.stem}-seed{cfg.seed}"
    final, problems = _validate(plain | update, Config, spare)
    if final is None:
        raise ConfigError(problems)
    return final


def load_settings(argv: Sequence[str], model: type[S], default: Path | None = None) -> S:
    """Read and check the settings of another program: one .yaml file and dotted overrides.

    default: the file where none is named; None: one must be. As `load_config`, for any model; rules
    that tie several keys raise CrossError in its validator.
    """
    raw, _ = _read(argv, schema_of(model), default)
    cfg, problems = _validate(raw, model, {})
    if cfg is None:
        raise ConfigError(problems)
    return cfg


def _to_unit_sum(weights: Mapping[str, float]) -> dict[str, float]:
    """Scale weights to sum to 1; weights that already do so to 1e-12 are kept bit for bit."""
    total = sum(weights.values())
    if abs(total - 1) < 1e-12:
        return dict(weights)
    return {name: weight / total for name, weight in weights.items()}


def _read(argv: Sequence[str], schema: Schema, default: Path | None) -> tuple[dict[str, Any], Path]:
    """Return the recipe merged with the overrides, as plain nested dicts, and the recipe's path."""
    files = [arg for arg in argv if "=" not in arg]
    strange = [arg for arg in files if not arg.endswith((".yaml", ".yml"))]
    if strange:
        raise ConfigError(
            [f"{a}: not understood; wanted a .yaml recipe or key=value" for a in strange]
        )
    if len(files) > 1:
        raise ConfigError([f"got {len(files)} recipes ({', '.join(files)}); wanted at most one"])
    if not files and default is None:
        raise ConfigError(["no settings came; wanted a .yaml file first, then any key=value"])
    recipe = Path(files[0]) if files else default
    assert recipe is not None
    if not recipe.is_file():
        raise ConfigError([f"{recipe}: no such recipe file"])
    try:
        merged: Any = OmegaConf.load(recipe)
        if not OmegaConf.is_dict(merged):
            raise ConfigError([f"{recipe}: got a list; wanted keys and values"])
        for arg in argv:
            if "=" in arg:
                merged = _merged(merged, arg, schema)
        plain = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError([f"{recipe}: {' '.join(str(error).split())}"]) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}, recipe


def _merged(recipe: Any, arg: str, schema: Schema) -> Any:
    """The recipe with one override; where a section meets a list or a number, the new one stands.

    Which of the two was wanted is for the schema to say.
    """
    override = _override(arg, schema)
    try:
        return OmegaConf.merge(recipe, override)
    except TypeError:
        key = arg.partition("=")[0]
        OmegaConf.update(recipe, key, OmegaConf.select(override, key), merge=False)
        return recipe


def _override(arg: str, schema: Schema) -> Any:
    """Parse `key=value`; a key that holds text takes the value as written ('007' stays '007')."""
    key, _, value = arg.partition("=")
    node = schema.node(key.split("."))
    is_text = bool(node) and accepted_types(node) <= {"string", "null"} and "enum" not in node
    is_null = "null" in accepted_types(node) and value in ("null", "~", "") if is_text else False
    word = f"{key}={json.dumps(value)}" if is_text and not is_null else arg
    try:
        return OmegaConf.from_dotlist([word])
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        what = f"{arg[:80]!r}: no setting ({error}); wanted key=value, as train.lr=0.001"
        raise ConfigError([what]) from error


def _validate(
    raw: Mapping[str, Any], model: type[S], spare: Mapping[str, Any]
) -> tuple[S | None, list[str]]:
    """Return the settings and no problems, or None and every problem found.

    Rules across keys need every key to be valid by itself, so after a failure the offending keys
    are dropped or taken from `spare`, valid settings, and the rules that do not involve them run.
    """
    try:
        return model.model_validate(raw), []
    except ValidationError as error:
        details = error.errors()
    schema = schema_of(model)
    lines, bad = schema.error_lines(details)
    try:
        failed = [schema.keys_of(detail) for detail in details]
        model.model_validate(_repair(raw, failed, spare) if bad else {})
    except ValidationError as error:
        causes = [detail.get("ctx", {}).get("error") for detail in error.errors()]
        for cause in causes:
            found = cause.problems if isinstance(cause, CrossError) else []
            lines += [text for keys, text in found if not _touches(keys, bad)]
    return None, lines


def _touches(keys: Sequence[str], bad: Sequence[str]) -> bool:
    return any(
        f"{k}.".startswith(f"{b}.") or f"{b}.".startswith(f"{k}.") for k in keys for b in bad
    )


def _repair(
    raw: Mapping[str, Any], failed: Sequence[Sequence[str]], spare: Mapping[str, Any]
) -> dict[str, Any]:
    """Return raw with failed keys dropped or, where one is known, given the spare value."""
    repaired = json.loads(json.dumps(raw, default=str))
    for loc in failed:
        here: Any = repaired
        there: Any = spare
        for part in loc:
            below = here.get(part)
            there = there.get(part) if isinstance(there, dict) else None
            if not isinstance(below, dict) or part == loc[-1]:
                here.pop(part, None)
                if there is not None:
                    here[part] = there
                break
            here = below
    return dict(repaired)


def _judge_problems(plain: Mapping[str, Any]) -> list[str]:
    rewards, watch, specs = (plain.get(key) for key in ("rewards", "watch", "judges"))
    specs = specs if isinstance(specs, dict) else {}
    used = [(f"rewards.{name}", name) for name in rewards] if isinstance(rewards, dict) else []
    used += [("watch", name) for name in watch] if isinstance(watch, list) else []
    lines = [
        f"judges.{name}: is the name of a packaged judge; choose another"
        for name in specs
        if name in JUDGES
    ]
    lines += [
        f"{key}: {name} is a monitor, which noise or blur would satisfy; put it under watch"
        for key, name in used
        if name in MONITORS and key != "watch"
    ]
    lines += [
        f"judges.{name}: is used nowhere; name it in rewards or watch, or take it out"
        for name in specs
        if name not in [used_name for _, used_name in used] and name not in JUDGES
    ]
    for key, name in used:
        try:
            resolve(str(name), specs)
        except ValueError as error:
            lines.append(f"{key}: {error}")
    return lines
