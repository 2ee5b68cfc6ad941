"""The hostile files that tools/hostile_files.py hands to `ghm`, and what it must answer.

Each `write(work, address)` fills the folder `work`, in which the command then runs. The traps lie
beside it: ../canary, ../secret.txt; `address` is that of a web server that must not be asked.
"""

import io
import json
import os
import pickle
import random
import re
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import yaml
from PIL import Image

CONFIG = "quick/retinanet_focal.yaml"
TINY = {
    "MODEL": {
        "TIMM": {"NAME": "mobilenetv3_small_050", "PRETRAINED": ""},
        "FPN": {"OUT_CHANNELS": 16},
        "RETINANET": {"NUM_CONVS": 1, "NUM_CLASSES": 2},
    },
    "DATASETS": {"CLASS_NAMES": ["one", "two"]},
    "INPUT": {"MIN_SIZE_TRAIN": [32], "MIN_SIZE_TEST": 32},
    "SOLVER": {"MAX_ITER": 1, "IMS_PER_BATCH": 1},
}
SCRIPT = "<script>alert(1)</script>"
# what a page could run, or a table or a terminal could take for its own
NAMES = (SCRIPT, '"><img src=x onerror=alert(1)>', "</td></table>", "javascript:alert(1)",
         "[x](javascript:alert(1))", "{{ 7 * 7 }}", "[/] [link=http://x]", "=cmd|' /C calc'!A0",
         "\x1b]0;title\x07\x1b[2J", "\u202egpj.exe", "a\nb | c")  # fmt: skip
ESCAPE = "a\x1b]0;title\x07\x1b[2J"
# what no output may hold: escape sequences, and marks that turn the direction of writing
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Case:
    """One hostile file. `says`: a regular expression that the error line must hold."""

    file: str
    tried: str
    write: Callable[[Path, str], None]
    command: tuple[str, ...]
    says: str
    exit: int = 3
    stdout: bool = False  # whether the command answers on stdout, as one that lists faults does
    check: Callable = lambda output, result: []

    @property
    def name(self) -> str:
        """What it is chosen by."""
        return f"{self.file}: {self.tried}"


# --- files that are in order -----------------------------------------------------------------


def picture(path: Path, size: tuple[int, int] = (40, 32), seed: int = 0) -> None:
    """A PNG or JPEG of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = random.Random(seed).randbytes(size[0] * size[1] * 3)
    image = Image.frombytes("RGB", size, noise)
    image.save(path, "JPEG" if path.suffix == ".jpg" else "PNG")


def coco(name: str = "a.png", box=(2, 3, 10, 8), **more) -> dict:
    """A COCO JSON of one image; `more` goes into its annotation."""
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": list(box)}
    annotation |= {"area": 80, "iscrowd": 0} | more
    return {
        "images": [{"id": 1, "file_name": name, "width": 40, "height": 32}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
    }


def coco_source(work: Path, text: str | dict, images: tuple[str, ...] = ("a.png",)) -> None:
    """source/train.json and its images; text as it stands, a dict as JSON."""
    source = work / "source"
    source.mkdir(exist_ok=True)
    text = text if isinstance(text, str) else json.dumps(text)
    (source / "train.json").write_text(text, encoding="utf-8")
    for number, image in enumerate(images):
        picture(source / image, seed=number)


def data_folder(work: Path) -> None:
    """data/, as `ghm data import` leaves it."""
    for number, split in enumerate(("train", "val")):
        picture(work / f"data/images/{split}.png", seed=number)
        text = json.dumps(coco(f"{split}.png"))
        (work / f"data/{split}.json").write_text(text, encoding="utf-8")


@cache
def detector() -> tuple[str, bytes]:
    """config.yaml and model.pth of a small detector."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of torch and Detectron2
        import torch
        from detectron2.modeling import build_model

        from ghm_d2.config import config_text, load_config
        from ghm_d2.register import register_all

        register_all()
        words = [word for pair in flat(TINY) for word in pair]
        cfg = load_config(CONFIG, [*words, "MODEL.DEVICE", "cpu"])
        torch.save({"model": build_model(cfg).state_dict()}, file)
    return config_text(cfg), file.getvalue()


def flat(tree: dict, prefix: str = "") -> list[tuple[str, str]]:
    """(key, value) of nested dicts, as overrides name them."""
    return [
        pair
        for key, value in tree.items()
        for pair in (
            flat(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else [(prefix + key, repr(value))]
        )
    ]


def trained(work: Path) -> None:
    """run/config.yaml and run/model.pth, and data/."""
    text, weights = detector()
    (work / "run").mkdir()
    (work / "run/config.yaml").write_text(text, encoding="utf-8")
    (work / "run/model.pth").write_bytes(weights)
    data_folder(work)


# --- weights ---------------------------------------------------------------------------------


class Evil:
    """Pickled, it is a command to make the canary."""

    def __init__(self, work: Path):
        self.canary = work.parent / "canary"

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


def weights(tried: str, name: str, write, says: str, config: str = CONFIG) -> Case:
    """A weight file, through `ghm predict`; write(path, work) makes it."""

    def whole(work: Path, address: str) -> None:
        picture(work / "a.png")
        write(work / name, work)

    command = ("predict", "--weights", name, "--config", config, "--output", "out", "a.png")
    return Case(f"weights {Path(name).suffix}", tried, whole, command, says)


def saved(content: Callable, legacy: bool = False):
    """Writes `content(work)` with torch.save."""

    def write(path: Path, work: Path) -> None:
        import torch

        torch.save(content(work), path, _use_new_zipfile_serialization=not legacy)

    return write


def pickled(content: Callable, protocol: int = 2):
    """Writes `content(work)` with pickle."""
    return lambda path, work: path.write_bytes(pickle.dumps(content(work), protocol))


def raw(data: bytes):
    """Writes `data`."""
    return lambda path, work: path.write_bytes(data)


def lying_tensor(path: Path, work: Path) -> None:
    """A torch zip whose one tensor says that it has 2**38 numbers, and has four."""
    import torch

    file, big = io.BytesIO(), b"\x8a\x05" + (2**38).to_bytes(5, "little")
    torch.save({"model": {"a": torch.zeros(4)}}, file)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.namelist():
            data = old.read(member)
            new.writestr(member, data.replace(b"K\x04", big) if "data.pkl" in member else data)


def zip_bomb(path: Path, work: Path) -> None:
    """A torch zip of 1.5 MB that unpacks to 1.5 GB."""
    import torch

    file = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(4)}}, file)
    with (
        zipfile.ZipFile(file) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, True, 1) as new,
    ):
        for member in old.namelist():
            if member.endswith("data/0"):
                with new.open(member, "w", force_zip64=True) as out:
                    for _ in range(96):
                        out.write(bytes(2**24))
            else:
                new.writestr(member, old.read(member))


def old_tar(path: Path, work: Path) -> None:
    """PyTorch's oldest format, a tar, with a link out of it in the place of the storages."""
    with tarfile.open(path, "w") as tar:
        for name in ("storages", "tensors", "pickle", "sys_info"):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, str(work.parent / "secret.txt")
            tar.addfile(member)


def many_bytes(path: Path, work: Path) -> None:
    """A torch zip whose pickle calls bytearray(2**36)."""
    call = b"cbuiltins\nbytearray\n\x8a\x05" + (2**36).to_bytes(5, "little") + b"\x85R"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", b"\x80\x02}U\x05model}U\x01a" + call + b"sss.")
        file.writestr("a/version", "3\n")
        file.writestr("a/byteorder", "little")


def safetensors(header: dict | bytes, length: int | None = None, data: bytes = bytes(16)):
    """Writes a safetensors file with this header, and perhaps another length of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length is None else length)
    return raw(size + text + data)


WEIGHTS = [
    weights("a pickle that runs code", "w.pth", pickled(Evil), "w.pth was refused: .*posix.system"),
    weights("the same within model.a.b, zip", "w.pth",
            saved(lambda work: {"model": {"a": {"b": Evil(work)}}}), "refused: .*posix.system"),
    weights("the same within optimizer, zip", "w.pth",
            saved(lambda work: {"model": {}, "optimizer": Evil(work)}), "refused"),
    weights("the same within trainer, before zip", "w.pth",
            saved(lambda work: {"model": {}, "trainer": [Evil(work)]}, legacy=True), "refused"),
    weights("a pickle that runs code", "w.pkl", pickled(Evil), "w.pkl was refused: .*posix.system"),
    weights("the same within blobs, protocol 4", "w.pkl",
            pickled(lambda work: {"blobs": {"a": Evil(work)}}, 4), "refused"),
    weights("a memo index of 2^31: 32 GiB", "w.pkl",
            raw(b"\x80\x02}r\xf0\xff\xff\x7f."), "holds no weights"),
    weights("an array said to have 2^40 bytes", "w.pkl",
            raw(b"\x80\x05\x96" + struct.pack("<Q", 2**34) + b"."), "truncated or not"),
    weights("a tensor said to have 2^38 numbers", "w.pth", lying_tensor, "truncated or not"),
    weights("1.5 MB that unpack to 1.5 GB", "w.pth", zip_bomb, "compressed"),
    weights("bytearray(2**36)", "w.pth", many_bytes, "refused: .*bytearray"),
    weights("an old tar with links out of it", "w.pth", old_tar, "truncated or not|refused"),
    weights("offsets beyond the file", "w.safetensors",
            safetensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**40]}}),
            "truncated or not a safetensors"),
    weights("a shape of 2^60 numbers", "w.safetensors",
            safetensors({"a": {"dtype": "F32", "shape": [2**30, 2**30], "data_offsets": [0, 16]}}),
            "truncated or not a safetensors"),
    weights("a header of 2^60 bytes", "w.safetensors",
            safetensors(b"{}", 2**60), "truncated or not a safetensors"),
    weights("deep nesting in the header", "w.safetensors",
            safetensors(b"[" * 10**5), "truncated or not a safetensors"),
    weights("a cut header", "w.weights", raw(b"\0" * 7), "no header", "coco/yolov3_darknet53.yaml"),
    weights("a count of images of 2^63, and noise", "w.weights",
            raw(struct.pack("<3iq", 0, 2, 0, 2**63 - 1) + b"\xff" * 4001), "does not fit",
            "coco/yolov3_darknet53.yaml"),
    Case("weights .pth", "the terminal's escape sequences in names of tensors",
         lambda work, address: (picture(work / "a.png"), escaped_names(work / "w.pth", work)),
         ("predict", "--weights", "w.pth", "--config", CONFIG, "--output", "out", "a.png"),
         "another model"),
]  # fmt: skip


def escaped_names(path: Path, work: Path) -> None:
    """Tensors with escape sequences in their names."""
    import torch

    torch.save({"model": {ESCAPE: torch.zeros(1)}}, path)


# --- configurations --------------------------------------------------------------------------


def config(tried: str, text: str, says: str, exit: int = 2, more=None, check=None) -> Case:
    """A stranger's config.yaml beside weights in order, through `ghm eval`.

    text: of run/config.yaml; {config} in it stands for that of the small detector.
    """

    def write(work: Path, address: str) -> None:
        trained(work)
        if more:
            more(work)
        file = work / "run/config.yaml"
        own = file.read_text(encoding="utf-8")
        canary = work.parent / "canary"
        filled = text.replace("{canary}", str(canary)).replace("{work}", str(work))
        filled = filled.replace("{address}", address)
        if filled.startswith("+"):  # beside the small detector's own keys
            tree = yaml.safe_load(own)
            merge(tree, yaml.safe_load(filled[1:]))
            filled = yaml.safe_dump(tree)
        file.write_text(filled, encoding="utf-8")

    command = ("eval", "--weights", "run/model.pth", "--dataset", "data", "--output", "out")
    return Case(
        "config.yaml", tried, write, (*command, "--device", "cpu"), says, exit,
        stdout=exit == 0, check=check or (lambda output, result: []),
    )  # fmt: skip


def merge(tree: dict, over: dict) -> None:
    """Put the values of `over` into `tree`."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            merge(tree[key], value)
        else:
            tree[key] = value


def laughs(first: str, more: str, levels: int = 12) -> str:
    """YAML whose aliases stand for ten to the power of `levels` things."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} {more.replace('@', f'*a{i - 1}')}" for i in range(1, levels)]
    return "\n".join(lines)


ten_keys = "{" + ", ".join(f"k{i}: @" for i in range(10)) + "}"
ten_items = "[" + ", ".join(["@"] * 10) + "]"


def files(**contents: str):
    """Writes text files below run/."""

    def write(work: Path) -> None:
        for name, text in contents.items():
            (work / "run" / f"{name}.yaml").write_text(text, encoding="utf-8")

    return write


def proposals(work: Path) -> None:
    """A file of "precomputed proposals", which Detectron2 unpickles."""
    (work / "run/proposals.pkl").write_bytes(pickle.dumps(Evil(work)))


CONFIGS = [
    config("!!python/object/apply", "SEED: !!python/object/apply:os.system ['touch {canary}']",
           "config.yaml: not a plain YAML file"),
    config("aliases to 10^12 groups", laughs("{x: 1}", ten_keys), "config.yaml: .*values"),
    config("aliases to 10^12 list items",
           laughs("[1]", ten_items) + "\nDATASETS: {TRAIN: *a11}", "config.yaml: .*values"),
    config("a list within itself", "DATASETS: {TRAIN: &a [*a]}", "config.yaml: .*themselves"),
    config("10^5 nested lists", "SEED: " + "[" * 10**5, "config.yaml: .*nested"),
    config("a number of 10^5 digits", "SEED: " + "9" * 10**5, "config.yaml: not a plain YAML"),
    config("month 99", "SEED: 2020-99-99", "config.yaml: not a plain YAML file"),
    config("!!timestamp of a word", "SEED: !!timestamp x", "config.yaml: not a plain YAML file"),
    config("10^5 brackets in a string", f"INPUT: {{MIN_SIZE_TRAIN: '{'(' * 10**5}'}}", "config"),
    config("_BASE_ ../../secret.txt", "_BASE_: ../../secret.txt", "secret.txt: a configuration is"),
    config("_BASE_ /etc/passwd", "_BASE_: /etc/passwd", "/etc/passwd: (?!.*root:)"),
    config("_BASE_ /dev/zero", "_BASE_: /dev/zero", "no configuration file /dev/zero"),
    config("_BASE_ at a web address", "_BASE_: {address}/x.yaml", "no configuration file"),
    config("_BASE_ of each other", "_BASE_: other.yaml", "leads back",
           more=files(other="_BASE_: config.yaml")),
    config("_BASE_ a chain of 2000", "_BASE_: b0.yaml", "_BASE_",
           more=files(**{f"b{i}": f"_BASE_: b{i + 1}.yaml" for i in range(2000)})),
    config("escape sequences in a key", '"\\e]0;title\\a\\e[2J": 1', "unknown key"),
    config("a key of 10^5 letters", f"{'A' * 10**5}: 1", "not a plain YAML"),
    config("BINS 10^9", "+MODEL: {GHM: {CLS: {BINS: 1000000000}}}", "MODEL.GHM.CLS.BINS"),
    config("FPN.OUT_CHANNELS 10^6", "+MODEL: {FPN: {OUT_CHANNELS: 1000000}}", "OUT_CHANNELS"),
    config("MIN_SIZE_TEST 10^9", "+INPUT: {MIN_SIZE_TEST: 1000000000, MAX_SIZE_TEST: 1000000000}",
           "INPUT.M.._SIZE_TEST"),
    config("a timm model at the hub", "+MODEL: {TIMM: {NAME: 'hf-hub:timm/resnet18.a1_in1k'}}",
           "no timm model"),
    config("a timm model in a folder", "+MODEL: {TIMM: {NAME: 'local-dir:{work}/run'}}",
           "no timm model"),
    config("proposals, which Detectron2 unpickles",
           "+MODEL: {LOAD_PROPOSALS: true}\n"
           "DATASETS: {PROPOSAL_FILES_TEST: ['{work}/run/proposals.pkl']}",
           "LOAD_PROPOSALS", more=proposals),
    config("a web address, files, other folders: with --weights, none is read or written",
           "+MODEL: {WEIGHTS: '{address}/x.pth', TIMM: {PRETRAINED: '{address}/y.pth'}}\n"
           "OUTPUT_DIR: '{work}/elsewhere'\nDATASETS: {TRAIN: ['/etc'], TEST: ['{work}/..']}",
           "detections.json", 0),
]  # fmt: skip


# --- run folders -----------------------------------------------------------------------------


def record(**more) -> dict:
    """A run.json."""
    own = {"method": "RetinaNet", "network": "R-50", "dataset": "d", "config_hash": "x", "seed": 1}
    return own | {"metrics": {"AP": 10.0}, "per_class": {}} | more


def comparison(**more) -> dict:
    """A comparison.json of two sides."""
    sides = [{"name": n, "config": "c", "overrides": [], "runs": [n]} for n in "ab"]
    own = {"name": "n", "question": "q", "dataset": "d", "budget": "b", "seeds": [1]}
    pairs = [{"side": "b", "reference": "a", "question": "q"}]
    return own | {"sides": sides, "pairs": pairs} | more


def report(tried: str, contents: dict, says: str, exit: int = 3, link=None, check=None) -> Case:
    """Files below folder/, through `ghm report`; dicts and lists become JSON."""

    def write(work: Path, address: str) -> None:
        for name, content in contents.items():
            path = work / "folder" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = content if isinstance(content, str) else json.dumps(content)
            path.write_text(content, encoding="utf-8")
        if link:
            link(work / "folder")

    file = next(iter(contents), "run.json").rpartition("/")[2]
    return Case(
        file, tried, write, ("report", "folder", "--output", "out"), says, exit,
        stdout=exit == 0, check=check or (lambda output, result: []),
    )  # fmt: skip


def linked(name: str, target: str):
    """Puts a link into the folder."""

    def link(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)

    return link


def fifo(folder: Path) -> None:
    """A pipe in the place of a run's metrics: opening it waits for ever."""
    os.mkfifo(folder / "r/metrics.jsonl")


def private_picture(folder: Path) -> None:
    """A link to a picture outside, in the place of that of the worst images."""
    picture(folder.parent.parent / "private.jpg")
    (folder / "r/worst.jpg").symlink_to("../../../private.jpg")


def no_picture(output: Path, result) -> list[str]:
    """The report must not hold the picture outside."""
    return ["the picture outside is in the report"] if (output / "worst_1.jpg").exists() else []


class Page(HTMLParser):
    """Collects what a page could run or fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "iframe", "object", "embed", "base", "form"):
            self.found.append(f"<{tag}>")
        for name, value in attrs:
            address = name in ("href", "src", "action", "srcset")
            outside = address and not (value or "").startswith(("data:image/", "data:,", "#"))
            if name.startswith("on") or outside:
                self.found.append(f"{name}={value}")


def harmless_report(output: Path, result) -> list[str]:
    """The page runs and fetches nothing, Markdown has no link, the CSV no formula."""
    page = Page()
    html = (output / "report.html").read_text(encoding="utf-8")
    page.feed(html)
    faults = [f"the page has {found}" for found in page.found]
    if "&lt;script&gt;" not in html:
        faults.append("the page does not show the names")
    text = (output / "report.md").read_text(encoding="utf-8")
    if any(SCRIPT in line for line in text.splitlines() if not line.startswith("    ")):  # code
        faults.append("report.md has a script")
    if UNPRINTABLE.search(text):
        faults.append("report.md has escape sequences")
    if "\n=cmd" in (output / "runs.csv").read_text(encoding="utf-8"):
        faults.append("runs.csv has a formula")
    return faults


def scripts() -> dict:
    """A comparison whose every text is hostile."""
    contents = {}
    sides = [{"name": f"{name} {i}", "config": name, "overrides": ["A", name], "runs": [f"s{i}"]}
             for i, name in enumerate(NAMES)]  # fmt: skip
    pairs = [{"side": sides[1]["name"], "reference": sides[0]["name"], "question": SCRIPT}]
    texts = dict.fromkeys(("name", "question", "dataset", "budget", "command"), SCRIPT)
    contents["comparison.json"] = comparison(sides=sides, pairs=pairs, **texts)
    for i, name in enumerate(NAMES):
        keys = ("method", "network", "dataset", "config_hash", "device", "code_version")
        per_class = dict.fromkeys(NAMES, 5.0)
        contents[f"s{i}/run.json"] = record(
            **dict.fromkeys(keys, name), packages={name: name}, per_class=per_class
        )
        worst = [{"file_name": other, "missed": 1, "false": 1} for other in NAMES]
        contents[f"s{i}/analysis.json"] = {"worst": worst}
    return contents


def worst_pictures(folder: Path) -> None:
    """The pictures whose captions name image files."""
    picture(folder / "s0/worst.jpg")


deep = "[" * 10**5
rows = [{"iteration": 10**400, "loss_cls": 1}, {"iteration": 1, "loss_cls": 1e308}]
rows += [{"iteration": 2, "loss_cls": float("nan"), "bbox/AP": -1e308}, {"iteration": -1e308}]
metrics = "\n".join([json.dumps({"iteration": 5, "loss_cls": 0.5}), *map(json.dumps, rows)])

REPORTS = [
    report("NaN, Infinity", {"r/run.json": record(metrics={"AP": float("nan")})}, "run.json"),
    report("a list where a number belongs", {"r/run.json": record(seed=[1])}, "$.seed"),
    report("10^5 nested lists", {"r/run.json": deep}, "run.json"),
    report("a number of 400 digits", {"r/run.json": record(metrics={"AP": 10**400})}, "run.json"),
    report("1e308, whose sum is infinite",
           {f"{s}/run.json": record(seed=s, metrics={"AP": 1e308}) for s in (1, 2)}, "run.json"),
    report("escape sequences in a value", {"r/run.json": record(status=[ESCAPE])}, "run.json"),
    report("a key that is none", {"r/run.json": record(**{ESCAPE: 1})}, "run.json"),
    report("a link to the secret", {}, "run.json",
           link=linked("r/run.json", "../../../secret.txt")),
    report("a folder of that name", {"r/run.json/x": "1"}, "run.json"),
    report("a link to /dev/zero", {}, "run.json", link=linked("r/run.json", "/dev/zero")),
    report("10^5 nested lists in a row",
           {"metrics.jsonl": "", "r/run.json": record(), "r/metrics.jsonl": deep}, "report", 0),
    report("numbers beyond any", {"metrics.jsonl": "", "r/run.json": record(),
                                  "r/metrics.jsonl": metrics}, "report", 0),
    report("a row of 100 MB", {"metrics.jsonl": "", "r/run.json": record(),
                               "r/metrics.jsonl": '{"a": "' + "x" * 10**8}, "metrics.jsonl"),
    report("a pipe that never ends", {"metrics.jsonl": "", "r/run.json": record()},
           "metrics.jsonl", link=fifo),
    report("a link to /dev/zero", {"metrics.jsonl": "", "r/run.json": record()},
           "metrics.jsonl", link=linked("r/metrics.jsonl", "/dev/zero")),
    report("a link to a picture outside", {"worst.jpg": "", "r/run.json": record()}, "report", 0,
           private_picture, no_picture),
    report("10^5 nested lists", {"analysis.json": "", "r/run.json": record(),
                                 "r/analysis.json": deep}, "analysis.json"),
    report("values of every wrong kind", {"analysis.json": "", "r/run.json": record(),
           "r/analysis.json": {"worst": 3, "gradient": [], "precision": "x", "noise": 1}},
           "report", 0),
    report("runs in ../../..", {"comparison.json": comparison(sides=[
           {"name": "a", "config": "c", "runs": ["../../.."]}], pairs=[])}, "lies elsewhere"),
    report("runs in /etc", {"comparison.json": comparison(sides=[
           {"name": "a", "config": "c", "runs": ["/etc"]}], pairs=[])}, "lies elsewhere"),
    report("NUL in the name of a run", {"comparison.json": comparison(sides=[
           {"name": "a", "config": "c", "runs": ["a\0b"]}], pairs=[])}, "comparison.json"),
    report("a run that is a link out", {"comparison.json": comparison()}, "lies elsewhere",
           link=linked("a", "../../..")),
    report("10^5 nested lists", {"comparison.json": deep}, "comparison.json"),
    report("scripts and formulas in every name", scripts(), "report", 0, worst_pictures,
           harmless_report),
    Case("last_checkpoint", "../../x, in a folder to resume: a file of the folder is taken",
         lambda work, address: resumable(work, "../../x"),
         ("train", "--resume", "--output", "run", "--dataset", "data", "--device", "cpu"),
         "run/model_0000000.pth was refused"),
    Case("last_checkpoint", "a checkpoint that runs code, in a folder to resume",
         lambda work, address: resumable(work, "model_0000000.pth"),
         ("train", "--resume", "--output", "run", "--dataset", "data", "--device", "cpu"),
         "refused: .*posix.system"),
]  # fmt: skip


def resumable(work: Path, note: str) -> None:
    """run/ as an interrupted training leaves it, with a checkpoint that runs code."""
    trained(work)
    saved(lambda work: {"model": {}, "trainer": {"a": Evil(work)}})(
        work / "run/model_0000000.pth", work
    )
    (work / "run/last_checkpoint").write_text(note, encoding="utf-8")
    (work / "run/run.json").write_text(json.dumps(record()), encoding="utf-8")


# --- annotations -----------------------------------------------------------------------------


def imported(
    file: str, tried: str, write, says: str, exit: int = 3, strict: bool = True, check=None
) -> Case:
    """A folder source/, through `ghm data import`; write(work) makes it."""
    command = ("data", "import", "source", "--output", "out", *(["--strict"] if strict else []))
    return Case(
        file, tried, lambda work, address: write(work), command, says, exit,
        stdout=exit == 0, check=check or (lambda output, result: []),
    )  # fmt: skip


def of_coco(tried: str, text, says: str, exit: int = 3, images=("a.png",), **more) -> Case:
    """A COCO JSON."""
    return imported("COCO JSON", tried, lambda w: coco_source(w, text, images), says, exit, **more)


def voc(tried: str, xml: str, says: str, exit: int = 3, stem: str = "a") -> Case:
    """A VOC annotation; %s in it stands for the path of the secret or the web address."""

    def write(work: Path, address: str) -> None:
        picture(work / f"source/JPEGImages/{stem}.jpg")
        folder = work / "source/Annotations"
        folder.mkdir()
        text = xml.replace("{secret}", str(work.parent / "secret.txt"))
        text = text.replace("{address}", address)
        (folder / f"{stem}.xml").write_text(text, encoding="utf-8")

    command = ("data", "import", "source", "--output", "out", "--strict")
    return Case("VOC XML", tried, write, command, says, exit, stdout=exit == 0)


def voc_object(name: str = "x", extra: str = "", box=(1, 1, 9, 9)) -> str:
    """The text of an annotation."""
    sides = "".join(
        f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return (
        f"<annotation>{extra}<object><name>{name}</name><bndbox>{sides}</bndbox></object>"
        "</annotation>"
    )


def yolo(tried: str, says: str, label: str = "0 .5 .5 .5 .5", exit: int = 3, **data) -> Case:
    """A YOLO folder; `data` goes into its data.yaml, or is it as `text`."""

    def write(work: Path) -> None:
        picture(work / "source/images/a.png")
        picture(work / "source/images/b.png", seed=1)
        (work / "source/labels").mkdir()
        for stem in "ab":
            (work / f"source/labels/{stem}.txt").write_text(label, encoding="utf-8")
        tree = {"names": ["x", "y"], "train": "images"} | data
        text = data.get("text") or yaml.safe_dump(tree)
        text = text.replace("{canary}", str(work.parent / "canary"))
        (work / "source/data.yaml").write_text(text, encoding="utf-8")

    kind = "YOLO data.yaml" if data else "YOLO label"
    return imported(kind, tried, write, says, exit)


def million(work: Path) -> None:
    """10^6 annotations of one image."""
    one = coco()
    one["annotations"] = [one["annotations"][0] | {"id": i + 1} for i in range(10**6)]
    coco_source(work, one)


def entities() -> str:
    """The billion laughs."""
    lines = ['<!ENTITY a0 "ha">']
    lines += [f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10)]
    return f"<!DOCTYPE annotation [{''.join(lines)}]>" + voc_object("&a9;")


def link_out(work: Path) -> None:
    """A COCO set whose image is a link to the secret."""
    coco_source(work, coco())
    (work / "source/a.png").unlink()
    (work / "source/a.png").symlink_to("../../secret.txt")


def nested_laughs() -> str:
    """A data.yaml whose class names are 10^12 aliases."""
    return laughs("[x]", ten_items) + "\nnames: *a11\ntrain: images"


big = {"size": [10**6, 10**6], "counts": [10**12]}
turns = [v for i in range(10**6) for v in (i % 41, i % 33)]

ANNOTATIONS = [
    of_coco("an image ../../secret.txt", coco("../../secret.txt"), "leaves the image folder"),
    of_coco("an image C:\\\\x\\\\..\\\\y", coco("C:\\x\\..\\y.png"), "leaves the image folder"),
    of_coco("an image /etc/passwd", coco("/etc/passwd"), "leaves the image folder"),
    of_coco("NUL in a name", coco("a\0.png"), "not the name of an image"),
    imported("COCO JSON", "an image that is a link to a secret text", link_out, "decoded"),
    of_coco("escape sequences in a name", coco(f"{ESCAPE}.png", (50, 50, 1, 1)),
            "outside|width|image", images=(f"{ESCAPE}.png",)),
    of_coco("escape sequences in a class",
            coco() | {"categories": [{"id": 1, "name": ESCAPE}]}, r"x1b\]0.* control"),
    of_coco("console markup in names", coco("[link=x]a[/].png", (50, 50, 1, 1))
            | {"categories": [{"id": 1, "name": "[/] [link=http://x]"}]},
            "outside", images=("[link=x]a[/].png",)),
    of_coco("a box of NaN", coco(box=(float("nan"), 1, 2, 3)), "not finite"),
    of_coco("a box of Infinity", coco(box=(1, 1, float("inf"), 3)), "not finite"),
    of_coco("a box of 1e308", coco(box=(1e308, 1e308, 1e308, 1e308)), "not finite"),
    of_coco("a box of 10^400", coco(box=(10**400, 1, 2, 3)), "not finite"),
    of_coco("ids true, \"1\" and 10^400",
            json.dumps(coco()).replace('"image_id": 1', f'"image_id": {10**400}'), "no image"),
    of_coco("a key that stands twice",
            '{"images": 3, ' + json.dumps(coco())[1:-1] + ', "images": []}', "no images"),
    of_coco("10^5 nested lists", deep, "not valid JSON"),
    of_coco("10^5 nested lists in a mask", json.dumps(coco(segmentation=0)).replace(
            '"segmentation": 0', '"segmentation": ' + "[" * 900 + "]" * 900), "segmentation"),
    of_coco("a mask said to be 10^6 x 10^6", coco(segmentation=big), "RLE of size"),
    of_coco("a mask with more pixels than its size",
            coco(segmentation={"size": [32, 40], "counts": [1, 10**15]}), "do not add up"),
    of_coco("a packed mask that lies",
            coco(segmentation={"size": [32, 40], "counts": "ooooooo0" * 9}), "do not add up"),
    of_coco("a polygon of 10^6 points", coco(segmentation=[turns]), "times the image"),
    imported("COCO JSON", "10^6 annotations: taken", million, "1000000", 0),
    voc("entities for 10^9 words", entities(), "refused: it declares XML entities"),
    voc("an entity that is a file", '<!DOCTYPE a [<!ENTITY x SYSTEM "file://{secret}">]>'
        + voc_object("&x;"), "refused: it declares XML entities"),
    voc("a DTD at a web address", '<!DOCTYPE a SYSTEM "{address}/x.dtd">' + voc_object("&x;"),
        "a.xml"),
    voc("a parameter entity at a web address",
        '<!DOCTYPE a [<!ENTITY % x SYSTEM "{address}/x.dtd"> %x;]>' + voc_object(),
        "refused: it declares XML entities"),
    voc("10^5 nested elements", "<a>" * 10**5 + "</a>" * 10**5, "a"),
    voc("an image ../../../secret.txt: not looked at, the image is found by its own name",
        voc_object(extra="<filename>../../../secret.txt</filename>"), "train", 0),
    voc("escape sequences in a file's name", "<a", "not valid XML", stem=ESCAPE),
    voc("a line end in a file's name", "<a", "not valid XML", stem="a\nerror: all is well"),
    voc("an escape code in a class", voc_object("&#27;[2J"), "not valid XML"),
    voc("a corner of 1e999", voc_object(box=(1, 1, "1e999", 9)), "not finite"),
    yolo("class 10^12", "unknown category", f"{10**12} .5 .5 .5 .5"),
    yolo("class 1e300", "unknown category", "1e300 .5 .5 .5 .5"),
    yolo("nan", "nan|finite", "0 nan .5 .5 .5"),
    yolo("10^6 lines: taken", "500000", "0 .5 .5 .5 .5\n" * 500_000, exit=0),
    yolo("!!python/object/apply", "not valid YAML",
         text="names: !!python/object/apply:os.system ['touch {canary}']\ntrain: images"),
    yolo("aliases to 10^12 class names", "class names", text=nested_laughs()),
    yolo("train: ../../images: read within the folder", "train", exit=0, train="../../images"),
    yolo("train: /etc", "leads out", train="/etc"),
    yolo("path: ../..: ignored", "train", exit=0, path="../.."),
]  # fmt: skip


# --- images ----------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG of zeros; its pixels are compressed row by row, and never held together."""
    start = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    )
    packer = zlib.compressobj(1)
    rows = [packer.compress(bytes(1 + 3 * width)) for _ in range(min(height, 500))]
    return (
        start
        + b"".join(more)
        + chunk(b"IDAT", b"".join(rows) + packer.flush())
        + chunk(b"IEND", b"")
    )


def tiff(width: int, height: int) -> bytes:
    """A TIFF of one strip whose header says that it is large."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 8), (262, 3, 1),
            (273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, 16)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    strip = zlib.compress(bytes(100))[:16].ljust(16, b"\0")
    return (
        b"II*\0" + struct.pack("<I", 24) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


def cut_jpeg() -> bytes:
    """The first half of a JPEG."""
    file = io.BytesIO()
    Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(64 * 64 * 3)).save(file, "JPEG")
    return file.getvalue()[: len(file.getvalue()) // 2]


def gif() -> bytes:
    """A GIF whose screen is 65535 x 65535."""
    return (
        b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x02\x02L\x01\x00;"
    )


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n"
TEXT_BOMB = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28), 1))

IMAGES = {
    "PNG, 50,000 x 50,000 px": ("a.png", png(50_000, 50_000), "limit"),
    "PNG, 2^31 x 2^31 px": (
        "a.png",
        png(40, 32)[:16] + b"\x7f\xff\xff\xff" * 2 + png(40, 32)[24:],
        "decoded|limit",
    ),
    "PNG with 256 MB of packed text": ("a.png", png(40, 32, TEXT_BOMB), "decoded"),
    "JPEG, cut": ("a.jpg", cut_jpeg(), "decoded"),
    "TIFF, 60,000 x 60,000 px": ("a.tif", tiff(60_000, 60_000), "limit"),
    "GIF, 65535 x 65535 px, named .png": ("a.png", gif(), "decoded"),
    "SVG named .png": ("a.png", SVG, "decoded"),
    "EPS named .png": ("a.png", EPS, "decoded"),
    "a pipe named .png": ("a.png", None, "no image|not a file"),
    "/dev/zero named .png": ("a.png", "/dev/zero", "no image|not a file"),
}
PREDICTED = ("PNG, 50,000 x 50,000 px", "JPEG, cut", "EPS named .png", "a pipe named .png")


def place(path: Path, data) -> None:
    """A file of these bytes, a link to this path, or a pipe."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if data is None:
        os.mkfifo(path)
    elif isinstance(data, str):
        path.symlink_to(data)
    else:
        path.write_bytes(data)


def image_cases(tried: str, name: str, data, says: str) -> list[Case]:
    """The image in a VOC folder to import, and for some to predict on."""

    def annotated(work: Path) -> None:
        place(work / "source/JPEGImages" / name, data)
        (work / "source/Annotations").mkdir()
        text = voc_object()
        (work / "source/Annotations/a.xml").write_text(text, encoding="utf-8")

    def beside(work: Path, address: str) -> None:
        trained(work)
        place(work / name, data)

    cases = [imported("image", f"{tried}, to import", annotated, says)]
    if tried in PREDICTED:
        command = ("predict", "--weights", "run/model.pth", "--output", "out", "--device", "cpu")
        cases.append(Case("image", f"{tried}, to predict on", beside, (*command, name), says))
    return cases


CASES = [
    *WEIGHTS,
    *CONFIGS,
    *REPORTS,
    *ANNOTATIONS,
    *(case for tried, row in IMAGES.items() for case in image_cases(tried, *row)),
]
