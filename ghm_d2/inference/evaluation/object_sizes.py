"""The numbers of objects behind the AP of small, medium and large ones."""

from collections.abc import Iterable

# COCO's limits of an object's area, px^2; an area on a limit counts on both sides, as in COCO
SIZES = {"APs": (0, 32**2), "APm": (32**2, 96**2), "APl": (96**2, 1e10)}


def objects_by_size(annotations: Iterable[dict]) -> dict[str, int]:
    """Return how many of `annotations`, in COCO's format, count for each of APs, APm and APl.

    Crowds are left out, as in evaluations.
    """
    areas = [a["area"] for a in annotations if not a.get("iscrowd", 0)]
    return {name: sum(low <= area <= high for area in areas) for name, (low, high) in SIZES.items()}
