"""The loader for configuration files.

A configuration file is data: it is parsed with YAML's safe loader. The one exception is a file
inside the installed Detectron2, whose own RetinaNet base evaluates an expression.
"""

import copy
import difflib
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.resources import files
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from ghm_d2.config.add_keys import add_ghm_config
from ghm_d2.config.renamed import current_name
from ghm_d2.errors import UsageError, printable

BASE_KEY = "_BASE_"
# Limits: an untrusted file must not exhaust memory by nested groups, aliases or a huge number
_MOST_VALUES, _MOST_BASES = 20_000, 20
_LIMITS = (  # (endings of keys of MODEL and INPUT, largest number); the first match counts
    (("_CHANNELS", "_DIM", "NUM_CONVS", "NUM_CONV", "NUM_FC"), 8192),
    (("SIZE_TRAIN", "SIZE_TEST", "CROP.SIZE", "NUM_CLASSES"), 65535),
    (("",), 1_000_000),
)


def get_cfg():
    """Return Detectron2's default configuration with this project's keys."""
    from detectron2.config import get_cfg as detectron2_defaults

    cfg = detectron2_defaults()
    add_ghm_config(cfg)
    return cfg


def load_config(path: str, overrides: Sequence[str] = ()):
    """Load a `CfgNode` from a YAML file and `KEY VALUE` overrides.

    Args:
        path: a file; or a name below the shipped configs/ or Detectron2's model zoo, such as
            "quick/retinanet_ghm.yaml" or "COCO-Detection/retinanet_R_50_FPN_1x.yaml".
        overrides: keys and values in turn, the values as Python or YAML literals.

    Raises:
        UsageError: no such file, not YAML, an unknown key (the error names the nearest known
            one), a value of the wrong type, a number too large for any machine, a file that tries
            to construct Python objects or has more than 20,000 values, aliases expanded, or
            MODEL.LOAD_PROPOSALS, whose files Detectron2 would execute.
    """
    cfg = get_cfg()
    values = _read_with_base(find_config(path), [], seen=())
    try:
        _merge(cfg, values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    merge_overrides(cfg, overrides)
    return cfg


def merge_overrides(cfg, overrides: Sequence[str]) -> None:
    """Merge `KEY VALUE` pairs, in place.

    Raises:
        UsageError: an odd number of words, an unknown key, a value of the wrong type or one that
            `load_config` refuses.
    """
    overrides = list(overrides)
    for word in overrides:
        if word.startswith("--"):
            raise UsageError(f"unknown option {word}; --help lists the options")
    if len(overrides) % 2:
        raise UsageError(f"overrides are KEY VALUE pairs; {overrides[-1]!r} has no value")
    _merge(cfg, dict(zip(overrides[::2], overrides[1::2], strict=True)))


def config_text(cfg) -> str:
    """Return `cfg` as YAML; the same values give the same text."""
    return yaml.safe_dump(plain_config(cfg))


def config_hash(text: str) -> str:
    """Return the first twelve hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def plain_config(cfg) -> dict:
    """Return a deep copy of `cfg` as plain dicts and lists."""
    return json.loads(json.dumps(cfg))


def find_config(path: str) -> Path:
    """Return the file that `path` names; see `load_config`.

    Raises:
        UsageError: there is none; the message suggests the nearest shipped name.
    """
    file = Path(path).expanduser()
    if file.is_file():
        return file
    for folder in (_shipped_configs(), _model_zoo_configs()):
        for candidate in (path, str(path).removeprefix("configs/")):
            if folder and not file.is_absolute() and (folder / candidate).is_file():
                return folder / candidate
    near = difflib.get_close_matches(str(path).removeprefix("configs/"), list_configs(), n=1)
    hint = f"did you mean configs/{near[0]}? " if near else ""
    raise UsageError(f"no configuration file {path}; {hint}`ghm configs` lists the shipped ones")


def list_configs() -> list[str]:
    """Return the names of the shipped configurations below configs/, without the Base- files."""
    folder = _shipped_configs()
    found = (f for f in folder.rglob("*.yaml") if not f.name.startswith("Base-"))
    return sorted(str(f.relative_to(folder)) for f in found)


def _shipped_configs() -> Path:
    return Path(str(files("ghm_d2.configs")))


def _model_zoo_configs() -> Path | None:
    spec = find_spec("detectron2")
    return Path(spec.origin).parent / "model_zoo" / "configs" if spec and spec.origin else None


def _read_with_base(file: Path, read: list[Path], seen: tuple[Path, ...]) -> dict[str, Any]:
    """Return the values of a file and its bases by dotted key; later bases override earlier ones.

    Args:
        read: the files read so far; this one is added.
        seen: the files that led here through their bases.
    """
    file = file.resolve()
    if file in seen:
        raise UsageError(f"{file}: {BASE_KEY} includes the file itself, directly or indirectly")
    read.append(file)
    if len(read) > _MOST_BASES:
        raise UsageError(f"{file}: {BASE_KEY} includes more than {_MOST_BASES} files; use fewer")
    if file.suffix == ".py":
        raise UsageError(
            f"{file}: ghm does not execute Python configurations, which are for Detectron2's "
            "lazyconfig_train_net.py; use a YAML file (`ghm configs` lists the shipped ones)"
        )
    try:
        loaded = _parse(file)
        size = _count(loaded, {})
    except RecursionError:
        raise UsageError(f"{file}: values are nested too deeply, or contain themselves") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: cannot be read: {error}") from None
    # PyYAML raises more than YAMLError, for numbers of 10,000 digits or months past December
    except (yaml.YAMLError, ValueError, AttributeError, TypeError) as error:
        raise UsageError(f"{file}: not a plain YAML file: {_first_line(error)}") from None
    if not isinstance(loaded, dict):
        raise UsageError(f"{file}: a configuration must be a mapping of keys to values")
    if size > _MOST_VALUES:
        raise UsageError(f"{file}: more than {_MOST_VALUES} values, with aliases expanded")
    bases = loaded.get(BASE_KEY) or []
    values: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        beside = file.parent / os.path.expanduser(str(base))
        base_file = beside if beside.is_file() else find_config(str(base))
        values |= _read_with_base(base_file, read, (*seen, file))
    return values | flatten({key: value for key, value in loaded.items() if key != BASE_KEY})


def _parse(file: Path):
    zoo = _model_zoo_configs()
    of_detectron2 = zoo is not None and file.is_relative_to(zoo.resolve())
    return _parse_text(file.read_text(encoding="utf-8"), of_detectron2)


@lru_cache(maxsize=64)  # a comparison reads the same few files hundreds of times
def _parse_text(text: str, of_detectron2: bool):
    try:
        return yaml.safe_load(text)
    except yaml.constructor.ConstructorError:
        if of_detectron2:
            return yaml.unsafe_load(text)  # Base-RetinaNet.yaml computes its anchors
        raise


def _count(node, known: dict[int, int]) -> int:
    """Return the number of values of a tree with its aliases expanded, without building it."""
    if not isinstance(node, dict | list | set):
        return 1
    if id(node) not in known:
        children = node.values() if isinstance(node, dict) else node
        known[id(node)] = 1 + sum(_count(child, known) for child in children)
    return known[id(node)]


def _merge(cfg, values: dict[str, Any]) -> None:
    """Merge values by dotted key, in place; raises as `load_config`."""
    known = flatten(cfg)
    groups = {group for key in known for group in accumulate(key.split(".")[:-1], "{}.{}".format)}
    for key, value in values.items():
        if key in groups:
            if value == {}:  # the file names the group and sets no key
                continue
            raise UsageError(f"{_shown(key)} is a group of keys, not a value; set a key in it")
        if key not in known:
            near = difflib.get_close_matches(key[:300], known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UsageError(f"unknown key {_shown(key)}{hint}")
        value = current_name(key, value)
        try:
            cfg.merge_from_list([key, copy.deepcopy(_fit_type(value, known[key]))])
        except (RecursionError, MemoryError):  # raised by Python's parser for brackets in a string
            raise UsageError(f"{key}: the value is nested too deeply") from None
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError, SyntaxError) as e:
            raise UsageError(f"{key} {_shown(str(value))}: {_first_line(e)}") from None
    _check_harmless(cfg)


def _check_harmless(cfg) -> None:
    """Refuse values that would run code, and numbers that would only exhaust a machine."""
    if cfg.MODEL.LOAD_PROPOSALS:
        raise UsageError(
            "MODEL.LOAD_PROPOSALS is not supported, because Detectron2 would execute code in the "
            "proposal files; set it to False"
        )
    for key, value in flatten({"MODEL": cfg.MODEL, "INPUT": cfg.INPUT}).items():
        limit = next(most for ends, most in _LIMITS if key.endswith(ends))
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, int | float) and abs(number) > limit:
                raise UsageError(f"{key} must be at most {limit}, not {number!s:.20}")


def flatten(node: dict, prefix: str = "") -> dict[str, Any]:
    """The values of nested groups by their dotted keys."""
    values: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        group = isinstance(value, dict) and value  # an empty dict is a value, of the wrong type
        values |= flatten(value, name + ".") if group else {name: value}
    return values


def _fit_type(value, default):
    """Convert values that `CfgNode` would refuse: 1 to 1.0, and the word true to True."""
    if isinstance(default, bool):
        return str(value).capitalize() if value in ("true", "false") else value
    if isinstance(default, float) and not isinstance(value, bool):
        with suppress(ValueError, TypeError):
            return float(value)
    return value


def _first_line(error: Exception) -> str:
    return _shown(str(error).strip("\"'").partition("\n")[0])


def _shown(text: str) -> str:
    """Shorten and escape `text` for the terminal, because part of it comes from a file."""
    return printable(text[:300])
