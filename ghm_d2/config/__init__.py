"""Configuration: the keys with their defaults, the YAML loader, the checks."""

from ghm_d2.config.add_keys import add_ghm_config
from ghm_d2.config.checks import check_config
from ghm_d2.config.detectron2_keys import check_detectron2_keys
from ghm_d2.config.loader import (
    config_hash,
    config_text,
    find_config,
    get_cfg,
    list_configs,
    load_config,
    merge_overrides,
    plain_config,
)

__all__ = [
    "add_ghm_config",
    "check_config",
    "check_detectron2_keys",
    "config_hash",
    "config_text",
    "find_config",
    "get_cfg",
    "list_configs",
    "load_config",
    "merge_overrides",
    "plain_config",
]
