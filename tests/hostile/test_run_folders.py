"""Run folders and comparisons of strangers, for `ghm report` and for `ghm train --resume`."""

import json
import os
from html.parser import HTMLParser
from pathlib import Path

import torch
from sound_files import DEEP, ESCAPE, Evil, picture, trained
from traps import UNPRINTABLE, Case, each, faults

SCRIPT = "<script>alert(1)</script>"
# what a page could run, or a table or a terminal could take for its own
NAMES = (SCRIPT, '"><img src=x onerror=alert(1)>', "</td></table>", "javascript:alert(1)",
         "[x](javascript:alert(1))", "{{ 7 * 7 }}", "[/] [link=http://x]", "=cmd|' /C calc'!A0",
         "\x1b]0;title\x07\x1b[2J", "\u202egpj.exe", "a\nb | c")  # fmt: skip


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

    def write(work: Path) -> None:
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
        stdout=exit == 0, check=check,
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


rows = [{"iteration": 10**400, "loss_cls": 1}, {"iteration": 1, "loss_cls": 1e308}]
rows += [{"iteration": 2, "loss_cls": float("nan"), "bbox/AP": -1e308}, {"iteration": -1e308}]
metrics = "\n".join([json.dumps({"iteration": 5, "loss_cls": 0.5}), *map(json.dumps, rows)])

CASES = [
    report("NaN, Infinity", {"r/run.json": record(metrics={"AP": float("nan")})}, "run.json"),
    report("a list where a number belongs", {"r/run.json": record(seed=[1])}, "run.json.*seed"),
    report("10^5 nested lists", {"r/run.json": DEEP}, "run.json"),
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
           {"metrics.jsonl": "", "r/run.json": record(), "r/metrics.jsonl": DEEP}, "report", 0),
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
                                 "r/analysis.json": DEEP}, "analysis.json"),
    report("values of every wrong kind", {"analysis.json": "", "r/run.json": record(),
           "r/analysis.json": {"worst": 3, "gradient": [], "precision": "x", "noise": 1}},
           "report", 0),
    report("runs in ../../..", {"comparison.json": comparison(sides=[
           {"name": "a", "config": "c", "runs": ["../../.."]}], pairs=[])}, "lies outside"),
    report("runs in /etc", {"comparison.json": comparison(sides=[
           {"name": "a", "config": "c", "runs": ["/etc"]}], pairs=[])}, "lies outside"),
    report("NUL in the name of a run", {"comparison.json": comparison(sides=[
           {"name": "a", "config": "c", "runs": ["a\0b"]}], pairs=[])}, "comparison.json"),
    report("a run that is a link out", {"comparison.json": comparison()}, "lies outside",
           link=linked("a", "../../..")),
    report("10^5 nested lists", {"comparison.json": DEEP}, "comparison.json"),
    report("scripts and formulas in every name", scripts(), "report", 0, worst_pictures,
           harmless_report),
    Case("last_checkpoint", "../../x, in a folder to resume: a file of the folder is taken",
         lambda work: resumable(work, "../../x"),
         ("train", "--resume", "--output", "run", "--dataset", "data", "--device", "cpu"),
         "run/model_0000000.pth was refused"),
    Case("last_checkpoint", "a checkpoint that runs code, in a folder to resume",
         lambda work: resumable(work, "model_0000000.pth"),
         ("train", "--resume", "--output", "run", "--dataset", "data", "--device", "cpu"),
         "refused: .*posix.system"),
]  # fmt: skip


def resumable(work: Path, note: str) -> None:
    """run/ as an interrupted training leaves it, with a checkpoint that runs code."""
    trained(work)
    torch.save({"model": {}, "trainer": {"a": Evil(work)}}, work / "run/model_0000000.pth")
    (work / "run/last_checkpoint").write_text(note, encoding="utf-8")
    (work / "run/run.json").write_text(json.dumps(record()), encoding="utf-8")


@each(CASES)
def test_it_is_refused_or_harmless(case, tmp_path):
    assert faults(case, tmp_path) == []
