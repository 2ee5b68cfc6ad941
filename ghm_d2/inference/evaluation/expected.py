"""TEST.EXPECTED_RESULTS: the AP that an evaluation must give, for tests of whole trainings."""

from ghm_d2.errors import RunError, UsageError
from ghm_d2.inference.evaluation.evaluate import Evaluation


def check_expected(cfg, evaluation: Evaluation) -> None:
    """Compare an evaluation with TEST.EXPECTED_RESULTS, [[task, metric, AP, tolerance], ...].

    Raises:
        UsageError: an entry is not of that form.
        RunError: a metric is missing, or differs from its expected value by more than allowed.
    """
    per_class = {f"AP-{name}": ap for name, ap in evaluation.per_class.items()}
    found = {"bbox": evaluation.metrics | per_class, "segm": evaluation.mask_metrics}
    for entry in cfg.TEST.EXPECTED_RESULTS:
        try:
            task, metric, expected, tolerance = entry
            value = found.get(task, {}).get(metric)
            wrong = value is None or abs(value - expected) > tolerance
        except (TypeError, ValueError):
            raise UsageError(
                "TEST.EXPECTED_RESULTS needs entries such as ['bbox', 'AP', 38.5, 0.2], not "
                f"{entry!r}"
            ) from None
        if wrong:
            raise RunError(
                f"{task} {metric} is {value}, but TEST.EXPECTED_RESULTS requires {expected} "
                f"± {tolerance}"
            )
