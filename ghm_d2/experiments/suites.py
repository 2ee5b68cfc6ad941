"""The suites: questions that a comparison can answer, and their sides; one file each in suites/.

RQ1 to RQ4 are the questions of the paper (Li, Liu, Wang, arXiv 1811.05181, section 4).
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from ghm_d2.errors import UsageError
from ghm_d2.records import Pair

BUDGETS = ("quick", "half", "full")
SUITES = (
    "claim",
    "density",
    "losses",
    "imbalance",
    "regression",
    "two-stage vs one-stage",
    "backbones",
    "systems",
    "noise",
    "noise-kinds",
    "batch-size",
    "additions",
)
_FOLDER = Path(__file__).parent / "suites"
DATA_CONFIG = "quick/retinanet_ghm.yaml"  # trained on each of the data sets that are compared


@dataclass(frozen=True)
class SuiteSide:
    """One configuration among those compared."""

    name: str
    config: str  # a shipped configuration's name or a file
    overrides: tuple[str, ...] = ()  # KEY VALUE in turn
    optional: bool = False  # trained only if named by --side, or with --optional
    # the side whose search this one shares, or any name that several sides give their common search
    settings_of: str = ""
    # share of wrong annotations in the generated digits, in total or by kind (see `DigitsSpec`)
    noise: float | dict[str, float] | None = None
    iterations: int = 0  # in the quick budget; 0: QUICK_ITERATIONS
    factors: dict[str, float] = field(default_factory=dict)  # key -> factor on its configured value
    dataset: str = ""  # the side's own folder, if the sides differ in their data


@dataclass(frozen=True)
class Suite:
    """A question, the sides that answer it, and the differences between them that matter."""

    name: str
    question: str
    sides: tuple[SuiteSide, ...]
    pairs: tuple[Pair, ...]


class _SideInFile(msgspec.Struct, forbid_unknown_fields=True):
    """A side in a suite's file; it is left out in a budget for which it has no configuration."""

    name: str
    quick: str = ""  # the configuration for two CPU cores
    published: str = ""  # the published recipe
    overrides: dict[str, str | int | float | bool] = {}
    optional: bool | Literal["quick"] = False  # "quick": only in that budget
    settings_of: str = ""
    noise: float | dict[str, float] | None = None
    iterations: int = 0
    factors: dict[str, float] = {}

    def side(self, budget: str) -> SuiteSide:
        return SuiteSide(
            self.name,
            self.quick if budget == "quick" else self.published,
            tuple(str(word) for pair in self.overrides.items() for word in pair),
            self.optional in (True, budget),
            self.settings_of,
            self.noise,
            self.iterations,
            self.factors,
        )


class _SuiteInFile(msgspec.Struct, forbid_unknown_fields=True):
    question: str
    sides: list[_SideInFile]
    pairs: list[Pair]
    # condition -> the fields that it changes; all sides and pairs are repeated in each condition
    conditions: dict[str, dict] = {}
    primary_in: str = ""  # the condition whose primary pair is the suite's; "": none

    def repeated(self) -> "_SuiteInFile":
        """The suite with its sides and pairs repeated for each condition."""
        if not self.conditions:
            return self
        sides, pairs = [], []
        for name, changes in self.conditions.items():
            for side in self.sides:
                fields = {"name": f"{side.name}, {name}"} | changes
                for merged in {"overrides", "factors"} & changes.keys():
                    fields[merged] = getattr(side, merged) | changes[merged]
                sides.append(msgspec.structs.replace(side, **fields))
            for pair in self.pairs:
                keys = ("side", "reference", "question")
                texts: dict[str, Any] = {key: f"{getattr(pair, key)}, {name}" for key in keys}
                primary = pair.primary and name == self.primary_in
                pairs.append(replace(pair, primary=primary, **texts))
        return _SuiteInFile(self.question, sides, pairs)


def read_suite(name: str, budget: str) -> Suite:
    """The suite of that name, one of SUITES, with the configurations for a budget."""
    file = _FOLDER / f"{name.replace(' ', '-')}.yaml"
    read = msgspec.yaml.decode(file.read_bytes(), type=_SuiteInFile).repeated()
    sides = tuple(side for entry in read.sides if (side := entry.side(budget)).config)
    return Suite(name, read.question, sides, _between(sides, read.pairs))


def _between(sides: Sequence[SuiteSide], pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """The pairs both of whose sides are among `sides`."""
    names = {side.name for side in sides}
    return tuple(pair for pair in pairs if {pair.side, pair.reference} <= names)


def find_suite(words: Sequence[str], budget: str, config: str | None = None) -> Suite:
    """The suite that a command's words name; "vs" between them may be left out.

    Args:
        words: a suite's name, its sides ("two-stage", "one-stage"), two and more
            configurations (files or names of shipped ones, ending in .yaml), or two and more
            folders of data sets.
        budget: one of BUDGETS.
        config: the configuration to train on each of several data sets; None for DATA_CONFIG.

    Raises:
        UsageError: the budget or a word is unknown (the message suggests known ones), or one of
            several folders is not a data set.
    """
    if budget not in BUDGETS:
        raise UsageError(f"--budget must be one of {', '.join(BUDGETS)}, not {budget!r}")
    words = [word for word in words if word != "vs"]
    if any(word.endswith((".yaml", ".yml")) for word in words):
        return _of_configs(words)
    if words and all(Path(word, "train.json").is_file() for word in words):
        return _of_data(words, config or DATA_CONFIG)
    by_words = {frozenset(name.split(" vs ")): name for name in SUITES}
    # "two-stage vs one-stage" in quotes is one word
    parts = frozenset(part for word in words for part in word.split(" vs "))
    known = {*SUITES, *(part for key in by_words for part in key)}
    if parts not in by_words and any(Path(word).is_dir() for word in {*words} - known):
        raise _no_data(words)
    if config:
        raise UsageError("--config works only for a comparison of data sets: FOLDER vs FOLDER")
    if parts not in by_words:
        raise _unknown(words, sorted(known))
    return read_suite(by_words[parts], budget)


def choose_sides(suite: Suite, names: Sequence[str] = (), optional: bool = False) -> Suite:
    """Return `suite` with only the sides `names`; without names, `optional` adds optional sides.

    If no pair of the suite is left, each side is compared with the first one. If no primary pair
    is left, the first pair becomes the primary one.

    Raises:
        UsageError: a side is unknown (the message suggests the nearest known one), fewer than two
            are left, or the suite has no sides for this budget.
    """
    if not suite.sides:
        raise UsageError(f"{suite.name} is available only with --budget quick")
    known = {side.name: side for side in suite.sides}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, cutoff=0.0)[0]
            raise UsageError(f"{suite.name} has no side {name!r}; did you mean {near!r}?")
    wanted = names or [s.name for s in suite.sides if optional or not s.optional]
    sides = tuple(side for side in suite.sides if side.name in wanted)
    if len(sides) < 2:
        raise UsageError("a comparison needs at least two sides; name more with --side")
    pairs = _between(sides, suite.pairs) or _against_first(sides)
    return replace(suite, sides=sides, pairs=_with_primary(pairs))


def _with_primary(pairs: tuple[Pair, ...]) -> tuple[Pair, ...]:
    """Return `pairs` with one primary pair: the first one marked so, else the first of all."""
    chosen = next((pair for pair in pairs if pair.primary), pairs[0])
    return tuple(replace(pair, primary=pair is chosen) for pair in pairs)


def _against_first(sides: Sequence[SuiteSide]) -> tuple[Pair, ...]:
    first = sides[0].name
    return tuple(Pair(s.name, first, f"{s.name} against {first}") for s in sides[1:])


def _of_configs(words: Sequence[str]) -> Suite:
    if len(words) < 2:
        raise UsageError("name at least two configurations to compare: A.yaml vs B.yaml")
    names = _distinct(words, [Path(word).stem for word in words])
    sides = tuple(SuiteSide(name, word) for name, word in zip(names, words, strict=True))
    question = "Which configuration is best?"
    return Suite(" vs ".join(names), question, sides, _against_first(sides))


def _of_data(words: Sequence[str], config: str) -> Suite:
    if len(words) < 2:
        raise UsageError("name at least two data sets to compare: FOLDER vs FOLDER")
    names = _distinct(words, [Path(word).resolve().name for word in words])
    pairs = zip(names, words, strict=True)
    sides = tuple(SuiteSide(name, config, dataset=word) for name, word in pairs)
    question = "Which annotations train the better detector?"
    return Suite(" vs ".join(names), question, sides, _against_first(sides))


def _distinct(words: Sequence[str], short: Sequence[str]) -> Sequence[str]:
    """Return names for sides: the short ones if they differ, else the words themselves."""
    names = words if len(set(short)) < len(short) else short
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UsageError(f"{name} is named twice; to repeat a run, use --seeds N")
    return names


def _no_data(words: Sequence[str]) -> UsageError:
    """Return the error for words that include a folder, and one that is not a data set."""
    from ghm_d2.data.checking.validate import IMPORT_HINT

    word = next(word for word in words if not Path(word, "train.json").is_file())
    what = "has no train.json" if Path(word).is_dir() else "no such folder"
    return UsageError(f"{word}: {what}, so it is no data set to compare; {IMPORT_HINT}")


def _unknown(words: Sequence[str], known: list[str]) -> UsageError:
    listed = ", ".join(SUITES)
    for word in words:
        if word not in known:
            near = difflib.get_close_matches(word, known, 1, cutoff=0.0)[0]
            return UsageError(
                f"unknown comparison {word!r}; did you mean {near!r}? The comparisons are "
                f"{listed}, A.yaml vs B.yaml, and FOLDER vs FOLDER"
            )
    what = f"unknown comparison {' '.join(words)!r}" if words else "no comparison is named"
    return UsageError(f"{what}; choose {listed}, A.yaml vs B.yaml, or FOLDER vs FOLDER")
