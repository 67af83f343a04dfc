"""Settings of a run: `load_config` reads and checks a recipe, `changes` compares two."""

from qirl_fast.config.compare import (
    changes,
    config_hash,
    derived,
    describe,
    refuse_changes,
    require_work,
    save_resolved,
    settings,
    training,
)
from qirl_fast.config.load import default_recipe, load_config, load_settings
from qirl_fast.config.rules import trained_group
from qirl_fast.config.schema import Config
from qirl_fast.config.wording import ConfigError

__all__ = [
    "Config",
    "ConfigError",
    "changes",
    "config_hash",
    "default_recipe",
    "derived",
    "describe",
    "load_config",
    "load_settings",
    "refuse_changes",
    "require_work",
    "save_resolved",
    "settings",
    "trained_group",
    "training",
]
