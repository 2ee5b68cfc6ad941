"""Progress of training, evaluation and analysis; silent unless the command line listens."""

from collections.abc import Iterable, Iterator


class Progress:
    """Says nothing; the command line's subclasses do."""

    def step(self, iteration: int, max_iter: int, scalars: dict[str, float]) -> None:
        """One training iteration is done: `scalars` holds losses, lr and seconds ("time")."""

    def track(self, items: Iterable, description: str, total: int) -> Iterator:
        """Pass `items` on, counting them."""
        yield from items

    def message(self, text: str) -> None:
        """Show a message that a person should read now."""
