"""The page of suspects shows hostile names as text, and filters without a script."""

from ghm_d2.reports.page.suspects import Card, page

NAME = "<script>alert(1)</script>"


def test_hostile_names_are_text_and_filters_are_of_what_is_there():
    card = {"score": 0.5, "seen": f"{NAME}, score 0.50", "file": f"{NAME}.png", "jpeg": b"x"}
    cards = [
        Card(number=1, kind="class", class_name=NAME, **card),
        Card(number=2, kind="missing", class_name="b} article {", **card),
    ]
    text = page(NAME, [NAME], cards)
    assert "<script" not in text and "&lt;script&gt;" in text
    style = text[text.index("<style>") : text.index("</style>")]
    assert "#kind-class:checked" in style and "#kind-box" not in style
    assert "b} article" not in style and "#class-1:checked" in style
    assert text.count('<article class="kind-') == 2
