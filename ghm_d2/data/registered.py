"""Properties of a data set that is registered with Detectron2: names, ids, kind."""

from importlib import import_module
from pathlib import Path

from ghm_d2.errors import UsageError


def set_name(registered: str) -> str:
    """Return the registered name, or FOLDER/SPLIT without its path for a folder's split."""
    path = Path(registered)
    return f"{path.parent.name}/{path.stem}" if path.suffix == ".json" else registered


def category_ids(registered: str) -> dict[int, int]:
    """Return category id, as in annotations and results -> class index, 0..K-1.

    Detectron2 registers no such table for LVIS, whose ids are 1 to K.
    """
    from detectron2.data import MetadataCatalog

    metadata = MetadataCatalog.get(registered)
    first = 1 if is_lvis(registered) else 0
    counted = {first + i: i for i in range(len(metadata.get("thing_classes", ())))}
    return dict(metadata.get("thing_dataset_id_to_contiguous_id", counted))


def has_annotations(registered: str) -> bool:
    """Return whether the data set has annotations; test sets that servers evaluate have none."""
    from detectron2.data import DatasetCatalog

    return any(item.get("annotations") for item in DatasetCatalog.get(registered))


def is_lvis(registered: str) -> bool:
    """Return whether to evaluate it as LVIS, whose images are not annotated with all classes."""
    from detectron2.data import MetadataCatalog

    return MetadataCatalog.get(registered).get("evaluator_type") == "lvis"


def require_lvis(registered: str) -> None:
    """Raise UsageError if the package that reads and evaluates LVIS cannot be imported."""
    try:
        import_module("lvis")
    except ImportError as error:
        raise UsageError(
            f"{registered} needs the package lvis ({error}); run pip install 'ghm_d2[lvis]'"
        ) from None
