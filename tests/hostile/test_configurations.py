"""Configurations that run code, read or fetch what they should not, or take all memory."""

import pickle
from pathlib import Path

import yaml
from sound_files import TEN_ITEMS, TEN_KEYS, Evil, laughs, trained
from traps import Case, each, faults, filled


def config(tried: str, text: str, says: str, exit: int = 2, more=None) -> Case:
    """A stranger's config.yaml beside weights in order, through `ghm eval`.

    text: of run/config.yaml, or after a + what is merged into that of the small detector; `filled`
        puts places into it. more(work) writes other files.
    """

    def write(work: Path) -> None:
        trained(work)
        if more:
            more(work)
        file, own = work / "run/config.yaml", filled(text, work)
        if own.startswith("+"):
            tree = yaml.safe_load(file.read_text(encoding="utf-8"))
            merge(tree, yaml.safe_load(own[1:]))
            own = yaml.safe_dump(tree)
        file.write_text(own, encoding="utf-8")

    command = ("eval", "--weights", "run/model.pth", "--dataset", "data", "--output", "out")
    return Case(
        "config.yaml", tried, write, (*command, "--device", "cpu"), says, exit, stdout=exit == 0
    )


def merge(tree: dict, over: dict) -> None:
    """Put the values of `over` into `tree`."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            merge(tree[key], value)
        else:
            tree[key] = value


def files(**contents: str):
    """Writes text files below run/."""

    def write(work: Path) -> None:
        for name, text in contents.items():
            (work / "run" / f"{name}.yaml").write_text(text, encoding="utf-8")

    return write


def proposals(work: Path) -> None:
    """A file of "precomputed proposals", which Detectron2 unpickles."""
    (work / "run/proposals.pkl").write_bytes(pickle.dumps(Evil(work)))


CASES = [
    config("!!python/object/apply", "SEED: !!python/object/apply:os.system ['touch {canary}']",
           "config.yaml: not a plain YAML file"),
    config("aliases to 10^12 groups", laughs("{x: 1}", TEN_KEYS), "config.yaml: .*values"),
    config("aliases to 10^12 list items",
           laughs("[1]", TEN_ITEMS) + "\nDATASETS: {TRAIN: *a11}", "config.yaml: .*values"),
    config("a list within itself", "DATASETS: {TRAIN: &a [*a]}", "config.yaml: .*themselves"),
    config("10^5 nested lists", "SEED: " + "[" * 10**5, "config.yaml: .*nested"),
    config("a number of 10^5 digits", "SEED: " + "9" * 10**5, "config.yaml: not a plain YAML"),
    config("month 99", "SEED: 2020-99-99", "config.yaml: not a plain YAML file"),
    config("!!timestamp of a word", "SEED: !!timestamp x", "config.yaml: not a plain YAML file"),
    config("10^5 brackets in a string", f"INPUT: {{MIN_SIZE_TRAIN: '{'(' * 10**5}'}}", "config"),
    config("_BASE_ ../../secret.txt", "_BASE_: ../../secret.txt", "secret.txt: a configuration"),
    config("_BASE_ /etc/passwd", "_BASE_: /etc/passwd", "/etc/passwd: (?!.*root:)"),
    config("_BASE_ /dev/zero", "_BASE_: /dev/zero", "no configuration file /dev/zero"),
    config("_BASE_ at a web address", "_BASE_: {address}/x.yaml", "no configuration file"),
    config("_BASE_ of each other", "_BASE_: other.yaml", "includes the file itself",
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
           "not a timm model"),
    config("a timm model in a folder", "+MODEL: {TIMM: {NAME: 'local-dir:{work}/run'}}",
           "not a timm model"),
    config("proposals, which Detectron2 unpickles",
           "+MODEL: {LOAD_PROPOSALS: true}\n"
           "DATASETS: {PROPOSAL_FILES_TEST: ['{work}/run/proposals.pkl']}",
           "LOAD_PROPOSALS", more=proposals),
    config("a web address, files, other folders: with --weights, none is read or written",
           "+MODEL: {WEIGHTS: '{address}/x.pth', TIMM: {PRETRAINED: '{address}/y.pth'}}\n"
           "OUTPUT_DIR: '{work}/elsewhere'\nDATASETS: {TRAIN: ['/etc'], TEST: ['{work}/..']}",
           "detections.json", 0),
]  # fmt: skip


@each(CASES)
def test_it_is_refused_or_harmless(case, tmp_path):
    assert faults(case, tmp_path) == []
