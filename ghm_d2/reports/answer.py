"""What a study's numbers allow one to say, in sentences."""

from ghm_d2.reports.results import Difference
from ghm_d2.reports.runs import SeedRun, SideRuns
from ghm_d2.reports.statistics import HIGHER, LOWER, NO_DIFFERENCE, NO_SEED, ONE_SEED, Estimate

# more questions than this are answered together, by what came out
MOST_SENTENCES = 6
# and more pairs of one question likewise
MOST_PHRASES = 3


def answer(differences: list[Difference], failures: list[str]) -> list[str]:
    """A sentence a question, then what failed, and how far the answer reaches.

    Args:
        failures: what `failure` says of the sides.
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
    return [*sentences, *failures, _reach(differences)]


def failure(side: SideRuns) -> str:
    """Such as "CE: diverged in 1 of 3 runs (seed 2: diverged at ...)"; "" where none failed."""
    parts = []
    bad = [r for r in side.runs if r.record and r not in side.finished]
    for status in dict.fromkeys(run.status for run in bad):
        alike = [run for run in bad if run.status == status]
        how = "; ".join(f"seed {r.seed}: {outcome(r) or status}" for r in alike)
        parts.append(f"{status} in {len(alike)} of {len(side.runs)} runs ({how})")
    if not parts:
        return ""
    rest = "its figures are of the others" if side.finished else "it has no figures"
    return f"{side.name}: {', '.join(parts)}; {rest}."


def outcome(run: SeedRun) -> str:
    """What the record of a run says of its end; "" where it says nothing, or is not there."""
    return run.record.outcome if run.record else ""


def signed(value: float | None) -> str:
    """A difference of AP, such as "+1.2"; never "+0.0" for what is not zero."""
    if value is None:
        return "-"
    return f"{value:+.1g}" if 0 < abs(value) < 0.05 else f"{value:+.1f}"


def interval(value: Estimate) -> str:
    """Such as "+0.4 to +2.0"."""
    return f"{signed(value.low)} to {signed(value.high)}"


def _on(question: str, differences: list[Difference]) -> str:
    """The answer to one question."""
    start = f"{_capital(question)}: " if question else ""
    if len(differences) <= MOST_PHRASES:
        return f"{start}{'; '.join(map(_phrase, differences))}."
    return start + _by_verdict(differences)


def _phrase(difference: Difference) -> str:
    pair, ap, result = difference.pair, difference.ap["AP"], difference.verdict
    if result in (HIGHER, LOWER):
        return f"{pair.side} has a {result} AP than {pair.reference}, by {_with_interval(ap)}"
    if result == NO_DIFFERENCE:
        return f"{result} between {pair.side} and {pair.reference}, AP {_with_interval(ap)}"
    shown = f" (AP {signed(ap.mean)})" if ap.n else ""
    return f"{result} on {pair.side} against {pair.reference}{shown}"


def _with_interval(ap: Estimate) -> str:
    return f"{signed(ap.mean)} (95% interval {interval(ap)}, {ap.n} seeds)"


def _by_verdict(differences: list[Difference]) -> str:
    """A sentence for each thing that came out, with the pairs of which it did."""
    sentences = []
    for result in (HIGHER, LOWER, NO_DIFFERENCE, ONE_SEED, NO_SEED):
        start = f"AP is {result}" if result in (HIGHER, LOWER) else _capital(result)
        alike = [_brief(d) for d in differences if d.verdict == result]
        if alike:
            sentences.append(f"{start} for {'; '.join(alike)}.")
    return " ".join(sentences)


def _brief(difference: Difference) -> str:
    pair, ap = difference.pair, difference.ap["AP"]
    text = f"{pair.side} against {pair.reference}"
    if ap.n < 2:
        return f"{text}, {signed(ap.mean)}" if ap.n else text
    return f"{text}, {signed(ap.mean)} ({interval(ap)})"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _reach(differences: list[Difference]) -> str:
    """What the intervals are, and what they do not cover."""
    counts = sorted({d.ap["AP"].n for d in differences if d.ap["AP"].n > 1})
    if not counts:
        return "A claim needs two seeds that finished on both sides."
    seeds = " or ".join(map(str, counts))
    text = f"Differences are of the same seeds, with 95% t intervals over {seeds} seeds"
    text += ", for chance in training, not in the choice of images"
    if len(differences) > 1:
        text += "; the intervals are not corrected for the number of comparisons"
        text += f" ({len(differences)})"
    return text + "."
