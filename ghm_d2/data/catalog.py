"""Registers data sets in Detectron2's catalog, and sets the keys of `cfg` that depend on the data.

A folder's split is registered under the path of its JSON file. Another process can resolve this
name again, so a saved configuration stays usable.
"""

import difflib
import logging
import os
import re
from functools import partial
from itertools import zip_longest
from pathlib import Path

from ghm_d2.config.detectors import set_num_classes, with_masks
from ghm_d2.data.checking.memo import cache_folder
from ghm_d2.data.checking.registered_sets import require_masks_of, validate
from ghm_d2.data.checking.validate import IMPORT_HINT, categories_of
from ghm_d2.data.coco_json import SPLITS, collector_off, image_root
from ghm_d2.data.digits import dataset as digits
from ghm_d2.data.output import new_folder
from ghm_d2.data.registered import set_name
from ghm_d2.errors import DataError, UsageError

logger = logging.getLogger(__name__)

DIGITS = "digits"
GENERATED = (DIGITS, *(f"{DIGITS}_{split}" for split in digits.SPLITS))
# Annotation fields that Detectron2's loader keeps only if asked: experiments on noise need this.
_EXTRA_KEYS = ["noise"]


def resolve(name_or_folder: str, split: str) -> str:
    """Return the name in Detectron2's DatasetCatalog for a split ("train", "val" or "test").

    name_or_folder: a registered name ("coco_2017_val"), the common part of such names
    ("coco_2017", "digits"), a folder with SPLIT.json, or such a JSON file. A registered name takes
    precedence over a folder; `./digits` is always a folder. `digits` is generated on first use. A
    folder is registered with its classes. Repeating a call changes nothing.
    Raises: UsageError for an unknown name, DataError for a folder without that split or with a
    malformed JSON.
    """
    from detectron2.data import DatasetCatalog

    name = str(name_or_folder)
    if name in GENERATED:
        return _resolve_digits(name, split)
    if name in DatasetCatalog:
        return name
    if f"{name}_{split}" in DatasetCatalog:
        return f"{name}_{split}"
    path = Path(os.path.abspath(name))
    if path.suffix == ".json" and path.stem in SPLITS:
        return _register(str(path), path)
    if os.path.isdir(path):
        return _register(str(path / f"{split}.json"), path / f"{split}.json")
    raise _unknown(name, split)


def is_registered(name: str) -> bool:
    """Return whether `resolve` reads `name` as a registered data set, even if a folder has it."""
    from detectron2.data import DatasetCatalog

    names = {name, *(f"{name}_{split}" for split in SPLITS)}
    return name in GENERATED or bool(names & {*DatasetCatalog.list()})


def apply_to_config(cfg, dataset: str | None = None, *, need_train: bool = True) -> None:
    """Resolve the data sets of a Detectron2 `CfgNode`, and set the number of classes, in place.

    If the classes are the ten digits, INPUT.RANDOM_FLIP becomes "none", and the copies of TEST.AUG
    are not mirrored.

    dataset: a name or folder as for `resolve`. Its train split becomes DATASETS.TRAIN, its val
    split DATASETS.TEST; "coco_2017_val" means "coco_2017", unless need_train is False: the named
    split is then evaluated. Without `dataset`, each entry of DATASETS.TRAIN and DATASETS.TEST may
    be a name or a folder. need_train: False ignores the training data, which an evaluation may
    lack; the classes must then be those of DATASETS.CLASS_NAMES, if it is set.
    Raises: as `resolve`; UsageError if no data set is named, if two sets of DATASETS.TEST have the
    same name, or if a detector with masks has an unknown INPUT.MASK_FORMAT; DataError if classes
    differ, or if MODEL.MASK_ON needs masks that are missing.
    """
    if dataset is not None:
        base = _without_split(dataset) if need_train else dataset
        train, test = [base], [base]
    else:
        train, test = list(cfg.DATASETS.TRAIN), list(cfg.DATASETS.TEST)
    if not test or (need_train and not train):
        key = "DATASETS.TRAIN" if test else "DATASETS.TEST"
        raise UsageError(f"no data set is given; pass --dataset NAME|FOLDER or set {key}")
    names = tuple(resolve(name, "val") for name in test)
    cfg.DATASETS.TEST = names
    _require_distinct([set_name(name) for name in names])
    if need_train:
        cfg.DATASETS.TRAIN = tuple(resolve(name, "train") for name in train)
        names += tuple(cfg.DATASETS.TRAIN)
    classes = _common_classes(names)
    trained = list(cfg.DATASETS.CLASS_NAMES)
    if not need_train and trained and trained != classes:
        raise DataError(
            f"{names[0]} and the data that the detector was trained on have "
            f"{_difference(classes, trained)}; evaluate on data with the classes of the training"
        )
    cfg.DATASETS.CLASS_NAMES = tuple(classes)
    set_num_classes(cfg, len(classes))
    if tuple(classes) == digits.CLASSES:
        cfg.INPUT.RANDOM_FLIP = "none"  # a mirrored digit is a different symbol
        cfg.TEST.AUG.FLIP &= not cfg.TEST.AUG.ENABLED
    if with_masks(cfg):
        require_masks_of(cfg.DATASETS.TEST, cfg.INPUT.MASK_FORMAT, "evaluation")
        if need_train:
            require_masks_of(cfg.DATASETS.TRAIN, cfg.INPUT.MASK_FORMAT, "training")


def tested_on_training(cfg) -> str:
    """Return a line about a set of DATASETS.TEST that is trained on too; "" if there is none.

    A registered name that does not end in _train, _val or _test is such a set with --dataset.
    """
    both = [name for name in cfg.DATASETS.TEST if name in cfg.DATASETS.TRAIN]
    if not both:
        return ""
    return (
        f"{set_name(both[0])} is both a training and a test set, so AP is measured on training "
        "images; pass a --dataset NAME with NAME_train and NAME_val registered, or name two data "
        "sets in the configuration, DATASETS.TRAIN and DATASETS.TEST"
    )


def _require_distinct(labels: list[str]) -> None:
    """Refuse names that occur twice: the results of each data set are listed under its name."""
    twice = [label for label in labels if labels.count(label) > 1]
    if twice:
        raise UsageError(
            f"DATASETS.TEST has two data sets named {twice[0]}; remove one or rename its folder"
        )


def data_label(registered: str) -> str:
    """Return a short name of the data: the folder's, or the registered name without its split."""
    if registered.endswith(".json"):
        return Path(registered).parent.name
    return re.sub(r"_(train|val|test)$", "", registered)


def classes_of(name: str) -> list[str]:
    """Return the class names of a registered data set, in the order of the model's outputs."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    classes = MetadataCatalog.get(name).get("thing_classes")
    if classes is None:  # some data sets set them only when they are loaded
        DatasetCatalog.get(name)
        classes = MetadataCatalog.get(name).get("thing_classes")
    if not classes:
        raise DataError(
            f"{name}: the data set is registered without class names; "
            f"set MetadataCatalog.get({name!r}).thing_classes"
        )
    return list(classes)


def locate(name_or_folder: str) -> dict[str, tuple[str, str]]:
    """Return split -> (COCO JSON, image folder) for every existing split. Raises as `resolve`."""
    path = Path(name_or_folder)
    if name_or_folder != DIGITS and os.path.isdir(path):
        found = [path / f"{split}.json" for split in SPLITS]
        files = {p.stem: (str(p), str(image_root(path))) for p in found if p.is_file()}
        if not files:
            raise DataError(f"{path}: has no train.json, val.json or test.json; {IMPORT_HINT}")
        return files
    if name_or_folder == DIGITS:
        folder = digits_folder()
        return {s: (str(folder / f"{s}.json"), str(folder / "images")) for s in digits.SPLITS}
    return _locate_registered(name_or_folder)


def digits_folder(spec: digits.DigitsSpec | None = None) -> Path:
    """Return the folder of the generated data set, and generate it if it is missing.

    It lies under $DETECTRON2_DATASETS, or else under the user's cache folder, and its name holds
    the specification's hash. Safe for several processes at once.
    """
    spec = spec or digits.DigitsSpec()
    root = os.environ.get("DETECTRON2_DATASETS") or cache_folder()
    folder = Path(os.path.abspath(root)) / f"digits-{spec.digest}"
    if not folder.is_dir():
        logger.info("generating the data set digits in %s", folder)
        try:
            with new_folder(folder) as draft:
                digits.write(spec, draft)
        except UsageError:
            if not (folder / "val.json").is_file():
                raise
            # Another process was quicker; what it wrote is the same.
    return folder


def _resolve_digits(name: str, split: str) -> str:
    if name == DIGITS:
        if split not in digits.SPLITS:
            raise UsageError(f"digits has no {split} split, only train and val")
        name = f"{DIGITS}_{split}"
    return _register(name, digits_folder() / f"{name.removeprefix(f'{DIGITS}_')}.json")


def _without_split(dataset: str) -> str:
    """Return `coco_2017` for `coco_2017_val`, and the folder for one of its JSON files."""
    from detectron2.data import DatasetCatalog

    path = Path(dataset)
    if path.suffix == ".json" and path.stem in SPLITS:
        return str(path.parent)
    base, _, split = dataset.rpartition("_")
    known = dataset in DatasetCatalog or base == DIGITS
    if not known or split not in SPLITS:
        return dataset
    return base


def _register(name: str, json_file: Path) -> str:
    from detectron2.data import DatasetCatalog, MetadataCatalog

    if not json_file.is_file():
        raise DataError(f"{json_file}: no such file; {IMPORT_HINT}")
    root = str(image_root(json_file.parent))
    categories = categories_of(str(json_file))
    about = {
        "json_file": str(json_file),
        "image_root": root,
        "evaluator_type": "coco",
        "thing_classes": [name for _, name in categories],
        "thing_dataset_id_to_contiguous_id": {c[0]: i for i, c in enumerate(categories)},
    }
    if name in DatasetCatalog:
        old = MetadataCatalog.get(name)
        if all(old.get(key) == value for key, value in about.items()):
            return name
        DatasetCatalog.remove(name)  # the files have changed since
    if name in MetadataCatalog.list():
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, partial(_load, name, str(json_file), root))
    MetadataCatalog.get(name).set(**about)
    return name


def _load(name: str, json_file: str, root: str) -> list[dict]:
    from detectron2.data.datasets import load_coco_json

    # Detectron2's loader fails on bad input with an assertion or KeyError that names no file.
    validate(name, "evaluation")  # needs less; a training has validated before
    with collector_off():
        return load_coco_json(json_file, root, name, extra_annotation_keys=_EXTRA_KEYS)


def _locate_registered(name: str) -> dict[str, tuple[str, str]]:
    from detectron2.data import DatasetCatalog, MetadataCatalog

    found = {}
    for split in SPLITS:
        if f"{name}_{split}" in DatasetCatalog:
            found[split] = f"{name}_{split}"
    if not found:
        verbatim = resolve(name, "train")
        stem = Path(verbatim).stem
        found[next((s for s in SPLITS if stem.endswith(s)), "train")] = verbatim
    files = {s: MetadataCatalog.get(n) for s, n in found.items()}
    lacking = [found[s] for s, m in files.items() if m.get("json_file") is None]
    if lacking:
        raise DataError(f"{lacking[0]}: registered without a COCO JSON, which this command needs")
    there = {s: m for s, m in files.items() if os.path.isfile(m.json_file)} or files
    return {s: (m.json_file, m.get("image_root", "")) for s, m in there.items()}


def _common_classes(names: tuple[str, ...]) -> list[str]:
    first = classes_of(names[0])
    for name in names[1:]:
        other = classes_of(name)
        if other != first:
            raise DataError(
                f"{names[0]} and {name} have {_difference(first, other)}; all data sets of a run "
                "need the same classes in the same order"
            )
    return first


def _difference(a: list[str], b: list[str]) -> str:
    """Describe how two lists of classes differ, in a text that stays short for eighty classes."""
    pairs = zip_longest(a, b, fillvalue="(no class)")
    one, other = next(pair for pair in pairs if pair[0] != pair[1])
    return (
        f"different classes ({len(a)} and {len(b)}): the first has {one!r} where the second has "
        f"{other!r}"
    )


def _unknown(name: str, split: str) -> UsageError:
    from detectron2.data import DatasetCatalog

    if os.sep in name or name.endswith(".json"):
        return UsageError(f"{name}: no such folder, and no registered data set has this name")
    known = set(DatasetCatalog.list()) | {DIGITS}
    if splits := [f"{name}_{s}" for s in SPLITS if f"{name}_{s}" in known]:
        return UsageError(
            f"the data set {name} has no {split} split, only {' and '.join(splits)}; register "
            f"{name}_{split}, or name two data sets in DATASETS.TRAIN and DATASETS.TEST"
        )
    known |= {n.removesuffix(f"_{s}") for n in known for s in SPLITS}
    near = difflib.get_close_matches(name, sorted(known), 1, cutoff=0.0)
    return UsageError(
        f"unknown data set {name!r} ({split} split): the most similar known name is {near[0]!r}; "
        "a folder with train.json and val.json is accepted too"
    )
