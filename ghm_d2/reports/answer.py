"""The answer that a study's numbers allow, in sentences."""

from ghm_d2.records import DIVERGED, Comparison
from ghm_d2.reports.results import Difference
from ghm_d2.reports.runs import SeedRun, SideRuns
from ghm_d2.reports.statistics.verdicts import (
    ENOUGH_SEEDS,
    HIGHER,
    LOWER,
    NO_SEED,
    ONE_SEED,
    SAME,
    UNDECIDED,
    Verdict,
)
from ghm_d2.reports.wording import confidence, interval, p_value, signed

# more questions than this are answered together, by verdict
MOST_SENTENCES = 6
# more pairs than this of one question, too
MOST_PHRASES = 3


def answer(differences: list[Difference], failures: list[str], comparison: Comparison) -> list[str]:
    """One sentence per question, then the failures, and how far the answer reaches.

    Args:
        failures: the sentences of `failure` on the sides.
        comparison: the comparison that the differences belong to.
    """
    if not differences:
        return ["There is nothing to compare: no pair of configurations.", *failures]
    questions = list(dict.fromkeys(d.pair.question for d in differences))
    if len(questions) > MOST_SENTENCES:
        sentences = [_by_verdict(differences)]
    else:
        sentences = [
            _on(question, [d for d in differences if d.pair.question == question])
            for question in questions
        ]
    return [*sentences, *failures, *_descriptive(differences), *reach(differences, comparison)]


def failure(side: SideRuns) -> str:
    """A sentence on the runs that did not finish, and how they count; "" if all did.

    An example: "CE: diverged in 1 of 3 runs, which counts as AP 0 (seed 2: diverged at ...)".
    """
    parts = []
    bad = [r for r in side.runs if r.record and r not in side.finished]
    for status in dict.fromkeys(run.status for run in bad):
        alike = [run for run in bad if run.status == status]
        how = "; ".join(f"seed {r.seed}: {outcome(r) or status}" for r in alike)
        counted = "which counts as AP 0" if status == DIVERGED else "which is missing"
        parts.append(f"{status} in {len(alike)} of {len(side.runs)} runs, {counted} ({how})")
    return f"{side.name}: {', '.join(parts)}." if parts else ""


def outcome(run: SeedRun) -> str:
    """The outcome that the run's record states; "" if it states none or there is no record."""
    return run.record.outcome if run.record else ""


def _on(question: str, differences: list[Difference]) -> str:
    """The answer to one question."""
    told = question in ("", _named(differences[0]))  # the answer itself names the sides
    start = "" if told else f"{_capital(question)}: "
    if len(differences) <= MOST_PHRASES:
        return f"{start}{'; '.join(map(_phrase, differences))}."
    return start + _by_verdict(differences)


def _phrase(difference: Difference) -> str:
    pair, verdict, word = difference.pair, difference.verdict, difference.verdict.word
    if word in (HIGHER, LOWER):
        return f"{pair.side} has a {word} AP than {pair.reference}, by {_with_interval(verdict)}"
    if word == SAME:
        return f"{pair.side} has {word} AP as {pair.reference}, {_with_interval(verdict)}"
    if word == UNDECIDED:
        return f"{word} between {pair.side} and {pair.reference}, AP {_with_interval(verdict)}"
    shown = f" (AP {signed(verdict.effect.mean)})" if verdict.effect.n else ""
    return f"{word} on {pair.side} against {pair.reference}{shown}"


def _with_interval(verdict: Verdict) -> str:
    found = verdict.estimate
    p = p_value(verdict.p)
    p = f"p {p[0]} {p[1:]}" if p[0] == "<" else f"p = {p}"
    shown = f"{confidence(verdict.alpha)} interval {interval(found)}, {p}"
    return f"{signed(found.mean)} ({shown}, {found.n} seeds)"


def _descriptive(differences: list[Difference]) -> list[str]:
    """One sentence on the undecided pairs with diverged runs, leaving these runs out.

    Their AP of 0 makes an interval so wide that it says nothing about the runs that finished.
    """
    parts = [
        f"{_named(d)}, {signed(d.finished.mean)} over {d.finished.n} of {len(d.seeds)} seeds "
        f"({d.diverged[0]} and {d.diverged[1]} runs diverged)"
        for d in differences
        if d.verdict.word == UNDECIDED and any(d.diverged) and d.finished.n
    ]
    start = "Descriptive, not tested: mean difference of AP over the seeds that finished on both"
    return [f"{start} sides: {'; '.join(parts)}."] if parts else []


def _by_verdict(differences: list[Difference]) -> str:
    """One sentence per verdict, with the pairs that have it."""
    sentences = []
    order = [HIGHER, LOWER, SAME, UNDECIDED]
    words = [d.verdict.word for d in differences]
    order += [word for word in words if word not in (*order, ONE_SEED, NO_SEED)]
    for word in dict.fromkeys([*order, ONE_SEED, NO_SEED]):
        start = f"AP is {word}" if word in (HIGHER, LOWER, SAME) else _capital(word)
        alike = [_brief(d) for d in differences if d.verdict.word == word]
        if alike:
            sentences.append(f"{start} for {'; '.join(alike)}.")
    return " ".join(sentences)


def _brief(difference: Difference) -> str:
    ap = difference.ap["AP"]
    text = _named(difference)
    if ap.n < 2:
        return f"{text}, {signed(ap.mean)}" if ap.n else text
    return f"{text}, {signed(ap.mean)} ({interval(ap)})"


def _named(difference: Difference) -> str:
    return f"{difference.pair.side} against {difference.pair.reference}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def reach(differences: list[Difference], comparison: Comparison) -> list[str]:
    """Say which chance the intervals count, how they are corrected, and how far to trust them."""
    counts = sorted({d.verdict.effect.n for d in differences if d.verdict.effect.n > 1})
    if not counts:
        return ["A claim needs two seeds that finished on both sides."]
    text = f"Differences are paired by seed ({' or '.join(map(str, counts))} seeds); the intervals"
    known = [d.verdict.effect.images is not None for d in differences if d.verdict.effect.n > 1]
    if all(known):
        text += " count the chance in training and in the choice of test images"
    elif any(known):
        text += " count the chance in training and, where runs have kept replicates, in the choice"
        text += " of test images"
    else:
        text += " count the chance in training, not in the choice of test images, of which these"
        text += " runs have kept no replicates"
    sentences = [f"{text}. {_corrected(differences)}".strip()]
    looks, planned = comparison.unplanned_looks, len(comparison.seeds)
    tested = {d.verdict.effect.n for d in differences if d.verdict.p is not None}
    early = sorted(n for n in tested.intersection(comparison.looks) if n < planned)
    if early and planned >= ENOUGH_SEEDS:
        at = " or ".join(map(str, early))
        sentences.append(f"A pair that the look at {at} seeds decided keeps its verdict.")
    elif counts[0] < ENOUGH_SEEDS:
        sentences.append(f"With fewer than {ENOUGH_SEEDS} seeds this is exploration, not evidence.")
    if looks:
        what = "Pairs and margin were chosen after all results"
        if any(look < planned for look in looks):
            what = f"Seeds were added after the verdict of {' and '.join(map(str, looks))} seeds"
        sentences.append(
            f"{what} could be seen, which was not planned: a claim is wrong more often than in 5 % "
            "of cases. Take it as exploration."
        )
    return sentences


def _corrected(differences: list[Difference]) -> str:
    others = sum(not d.pair.primary for d in differences)
    text = ""
    for d in differences:
        if d.pair.primary and others:
            text = f"The primary pair, {_named(d)}, is tested alone. "
    if others > 1:
        what = "The other" if text else "The"
        text += f"{what} {others} pairs are corrected for each other (Holm)."
    return text.strip()
