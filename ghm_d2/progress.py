"""Progress of training, evaluation and analysis; silent unless the command line listens."""

from collections.abc import Iterable, Iterator


class Progress:
    """Shows nothing; the command line's subclasses show the progress."""

    def step(self, iteration: int, max_iter: int, scalars: dict[str, float]) -> None:
        """Show a finished training iteration; `scalars` holds losses, lr and seconds ("time")."""

    def track(self, items: Iterable, description: str, total: int) -> Iterator:
        """Yield `items`, showing how many of `total` are done."""
        yield from items

    def message(self, text: str) -> None:
        """Show a message that a person should read now."""
