"""Adds this project's keys to a configuration to which other projects add theirs too."""

import logging

from ghm_d2.config.keys import ghm_defaults
from ghm_d2.errors import UsageError


def add_ghm_config(cfg) -> None:
    """Add this project's keys, with their defaults, to a Detectron2 `CfgNode`, in place.

    Existing keys keep their values, so this may be called twice, and beside other projects'
    functions of this kind. Call it after them: a function that replaces a group removes our keys
    from it. A warning lists our keys to which another project has given other defaults.

    Raises:
        UsageError: another project has a value under the name of one of our groups.
    """
    theirs = _add_absent(cfg, ghm_defaults())
    if theirs:
        logging.getLogger(__name__).warning(
            "another project has set keys that ghm_d2 also reads; their values are kept: %s",
            ", ".join(theirs),
        )


def ghm_keys(cfg, group: str):
    """Return the `CfgNode` under `group`, such as "MODEL.FCOS", after checking our keys in it.

    Raises:
        UsageError: a key of ours is missing, because another project has replaced the group, or
            its value has another type and so must mean something else.
    """
    node, defaults = cfg, ghm_defaults()
    for part in group.split("."):
        node, defaults = node.get(part, {}), defaults[part]
    for key, default in defaults.items():
        if key not in node:
            raise UsageError(
                f"{group}.{key} is missing: call ghm_d2.config.add_ghm_config(cfg) after other "
                "projects have added their keys, and before you merge a file"
            )
        if not _fits(node[key], default):
            raise UsageError(
                f"{group}.{key} is {node[key]!r}, which ghm_d2 cannot use (maybe another project "
                f"set it); set it to a {type(default).__name__}, such as {default!r}"
            )
    return node


def _add_absent(node, ours, prefix: str = "") -> list[str]:
    """Add the keys that are absent.

    Returns:
        our keys that another project has given another default, with both values. A group that
        has all our keys already is taken for ours: its values may have been set since.
    """
    added, different = False, []
    for key, value in ours.items():
        name, group = f"{prefix}{key}", isinstance(value, dict)
        if key not in node:
            node[key] = type(ours)() if group else value
            added |= not group
        elif group != isinstance(node[key], dict):
            raise UsageError(
                f"{name} conflicts with a key of another project: in one of the projects it is a "
                "group of keys, in the other a single value"
            )
        elif not group and _as_list(node[key]) != _as_list(value):
            different.append(f"{name} {node[key]!r} (ghm_d2: {value!r})")
    inner = [
        _add_absent(node[k], v, f"{prefix}{k}.") for k, v in ours.items() if isinstance(v, dict)
    ]
    return sum(inner, different if added else [])


def _fits(value, default) -> bool:
    if type(default) is float and type(value) is int:
        return True
    if isinstance(default, dict):
        return isinstance(value, dict)
    return type(_as_list(value)) is type(_as_list(default))


def _as_list(value):
    return list(value) if isinstance(value, tuple) else value
