"""Hostile text is shown, never obeyed, in HTML as in Markdown."""

import pytest

from ghm_d2.reports.page.document import (
    Best,
    Document,
    Section,
    Table,
    Text,
    escape,
    html,
    is_picture,
    markdown,
    markdown_table,
)


def document(text: str) -> Document:
    blocks = [
        Text(text),
        Text(text, "note"),
        Text(text, "code"),
        Table((text, "AP"), [(text, Best("41.3")), ("b", "40.0")]),
    ]
    return Document(text, text, [text], [Section(text, blocks)])


def test_html_escapes_text_wherever_it_stands():
    hostile = '"><script>alert(1)</script>'
    page = html(document(hostile))
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)") >= 9
    assert "<strong>41.3</strong>" in page


def test_a_cell_stays_one_cell_in_markdown():
    table = markdown_table(Table(("Method", "AP"), [("a | b\nc\\|d", Best("41.3"))]))
    header, rule, row = table.splitlines()
    assert (header, rule) == ("| Method | AP |", "| --- | ---: |")
    assert row == r"| a \| b c\\\|d | **41.3** |"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("tf_efficientnet_lite0-FPN", "tf_efficientnet_lite0-FPN"),
        ("RetinaNet GHM-C + GHM-R", "RetinaNet GHM-C + GHM-R"),
        ("__init__", r"\_\_init\_\_"),
        ("**x** [a](b)", r"\*\*x\*\* \[a\](b)"),
        ("<b>&lt;", "&lt;b&gt;&amp;lt;"),
        ("`x`\n\n# y", r"\`x\` # y"),
    ],
)
def test_markdown_shows_text_as_it_is(text, shown):
    assert escape(text) == shown


@pytest.mark.parametrize("text", ["# title", "- item", "+ item", "12. item", "==="])
def test_a_paragraph_is_no_heading_and_no_list(text):
    lines = markdown(Document("t", "q", [], [Section("s", [Text(text)])])).splitlines()
    assert lines[-1] == f"&#{ord(text[0])};{text[1:]}"


def test_code_cannot_be_closed_from_within():
    text = markdown(Document("t", "q", [], [Section("s", [Text("a\n```\n# b", "code")])]))
    assert text.endswith("    a\n    ```\n    # b\n")


def test_what_is_no_picture_is_told():
    assert not is_picture(b"<svg onload=alert(1)>")
    assert not is_picture(b"")
