"""The page of suspect annotations: the worst first, each beside the model's detection."""

from collections.abc import Sequence
from dataclasses import dataclass

from ghm_d2.reports.page.document import data_uri, render

TEMPLATE = "suspects.html.j2"
# kind of suspect -> the words on its card
WORDS = {
    "class": "wrong class?",
    "box": "box off?",
    "extra": "no such object?",
    "missing": "annotation missing?",
}


@dataclass(frozen=True)
class Card:
    """A suspect as the page shows it.

    Attributes:
        number: its row in suspects.csv, from 1.
        kind: a key of WORDS.
        class_name: the annotation's class; for a missing annotation the class the model sees.
        seen: the model's detection, such as "7, score 0.84"; "" if there is none.
        file: the image's file name.
        jpeg: a picture of the annotation beside the detection.
    """

    number: int
    kind: str
    class_name: str
    score: float
    seen: str
    file: str
    jpeg: bytes

    @property
    def uri(self) -> str:
        """The picture as a data: URI."""
        return data_uri(self.jpeg, "jpeg")


def page(title: str, notes: Sequence[str], cards: Sequence[Card]) -> str:
    """One HTML file with a filter by kind and class; it loads nothing and has no script.

    Args:
        notes: paragraphs above the cards.
    """
    kinds = [kind for kind in WORDS if any(card.kind == kind for card in cards)]
    classes = sorted({card.class_name for card in cards})
    return render(
        TEMPLATE,
        title=title,
        notes=notes,
        cards=cards,
        words=WORDS,
        kinds={kind: sum(card.kind == kind for card in cards) for kind in kinds},
        classes={name: sum(card.class_name == name for card in cards) for name in classes},
        numbers={name: i for i, name in enumerate(classes)},
    )
