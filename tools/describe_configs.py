#!/usr/bin/env python3
"""Writes configs/catalog.json, the facts on each shipped configuration that `ghm configs` prints.

    python tools/describe_configs.py              # all; minutes, since the large ones are traced
    python tools/describe_configs.py quick/ssd    # names that begin like this

Run it after adding a configuration or changing what one builds, and commit the file. It records the
method, network, schedule, number of parameters, and GFLOPs for a picture of 640 x 480 px that is
resized as configured. Sides of the `systems` comparisons in results also get their measured AP.
"""

import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path

from ghm_d2.config import list_configs, load_config

ROOT = Path(__file__).parents[1]
CATALOG = ROOT / "configs" / "catalog.json"
PICTURE = (480, 640)  # (H, W), COCO's commonest


def main() -> None:
    """Describe the configurations whose names begin with one of the arguments, or all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=[""])
    wanted = tuple(parser.parse_args().names)
    known = json.loads(CATALOG.read_text(encoding="utf-8")) if CATALOG.is_file() else {}
    measured, catalog = measured_ap(ROOT / "results"), {}
    for name in list_configs():
        row = describe(name) if name.startswith(wanted) or name not in known else known[name]
        catalog[name] = row | {"measured": measured.get(name, [])}
        print(name, catalog[name], flush=True)
    lines = ",\n".join(f' "{name}": {json.dumps(row)}' for name, row in catalog.items())
    CATALOG.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def describe(name: str) -> dict:
    """Method, network, schedule, parameters and GFLOPs of a configuration."""
    import torch
    from detectron2.modeling import build_model

    from ghm_d2.analysis.cost import count_gflops
    from ghm_d2.describe import method_name, network_name, schedule_of
    from ghm_d2.register import register_all

    register_all()
    cfg = load_config(name)
    cfg.MODEL.DEVICE, cfg.MODEL.TIMM.PRETRAINED = "cpu", ""
    torch.manual_seed(0)  # a two-stage detector's cost depends on its proposals
    model = build_model(cfg).eval()
    return {
        "method": method_name(cfg),
        "network": network_name(cfg),
        "schedule": asdict(schedule_of(cfg)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "gflops": round(count_gflops(model, picture(cfg)), 2),
    }


def picture(cfg):
    """A grey picture, (3, H, W) uint8, resized as in testing."""
    import numpy as np
    import torch
    from detectron2.data.transforms import AugInput, AugmentationList

    from ghm_d2.data.loading.augment import build_augmentations

    grey = AugInput(np.full((*PICTURE, 3), 127, np.uint8))
    AugmentationList(build_augmentations(cfg, False))(grey)
    return torch.as_tensor(grey.image.transpose(2, 0, 1).copy())


def measured_ap(folder: Path) -> dict[str, list[dict]]:
    """Return each configuration's mean AP and number of seeds in the `systems` comparisons."""
    from ghm_d2.reports.study import find_comparisons, read_study

    found: dict[str, list[dict]] = {}
    for study in map(read_study, find_comparisons(folder)):
        if study.comparison.name != "systems":
            continue
        for compared, side in zip(study.comparison.sides, study.sides, strict=True):
            aps = [ap for ap in side.values("AP").values() if ap is not None]
            if aps and not compared.overrides:
                row = {"dataset": study.comparison.dataset, "AP": round(statistics.fmean(aps), 1)}
                found.setdefault(compared.config, []).append(row | {"seeds": len(aps)})
    return found


if __name__ == "__main__":
    main()
