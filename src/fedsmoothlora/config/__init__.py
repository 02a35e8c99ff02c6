"""Configurations: TOML files and recipes, read into one checked object and written back."""

from fedsmoothlora.config.model import Config, Sections
from fedsmoothlora.config.overrides import Unset, parse_override
from fedsmoothlora.config.paths import absolute_paths
from fedsmoothlora.config.reading import from_table, read, read_run_config, set_keys
from fedsmoothlora.config.shipped import recipes
from fedsmoothlora.config.toml import first_difference, flat, to_toml
from fedsmoothlora.errors import ConfigError

__all__ = [
    "Config",
    "ConfigError",
    "Sections",
    "Unset",
    "absolute_paths",
    "first_difference",
    "flat",
    "from_table",
    "parse_override",
    "read",
    "read_run_config",
    "recipes",
    "set_keys",
    "to_toml",
]
