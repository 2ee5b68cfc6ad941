"""Numbers in words: the forms in which tables, answers and figures show estimates."""

from ghm_d2.reports.statistics.estimates import Estimate


def number(value: float | None, form: str = ".1f") -> str:
    """A number, such as "41.3"; "-" if it is not known."""
    return "-" if value is None else f"{value:{form}}"


def with_half_width(value: Estimate, form: str, half_form: str = "") -> str:
    """A mean and half its interval, such as "41.3 ± 0.4"; without the half if it is not known.

    half_form: the form of the half, by default that of the mean.
    """
    mean, half = number(value.mean, form), value.half_width
    return mean if half is None else f"{mean} ± {half:{half_form or form}}"


def signed(value: float | None) -> str:
    """A difference of AP, such as "+1.2"; never "+0.0" unless it is zero."""
    if value is None:
        return "-"
    return f"{value:+.1g}" if 0 < abs(value) < 0.05 else f"{value:+.1f}"


def interval(value: Estimate) -> str:
    """The bounds of an interval, such as "+0.4 to +2.0"."""
    return f"{signed(value.low)} to {signed(value.high)}"


def confidence(alpha: float) -> str:
    """The confidence of an interval, 1 - alpha: "95%", or "98.3%" if corrected for three pairs."""
    return f"{100 * (1 - alpha):.3g}%"


def p_value(p: float | None) -> str:
    """A p-value, such as "0.012" and "<0.001"; "-" if nothing was tested."""
    if p is None:
        return "-"
    return "<0.001" if p < 0.001 else f"{p:.2g}"
