"""A document of paragraphs, tables and pictures, as Markdown and as one HTML file.

Names of classes, files and data sets may be hostile, so both formats escape every text.
"""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

TEMPLATE = "report.html.j2"


class Best(str):
    """A table cell in bold."""

    __slots__ = ()


@dataclass(frozen=True)
class Text:
    """A paragraph; `kind` is "text", "note" (small) or "code"."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """Rows of cells under headers; the first `text_columns` hold names, the others numbers."""

    headers: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    text_columns: int = 1
    kind: str = "table"


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG with its file name, a title, and a caption that says how to read it.

    `folded` pictures are shown on demand, if the format allows it.
    """

    file: str
    data: bytes
    title: str
    caption: str
    folded: bool = False
    kind: str = "picture"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in px."""
        return Image.open(io.BytesIO(self.data)).size

    @property
    def uri(self) -> str:
        """The picture itself as a data: URI."""
        return data_uri(self.data, "png" if self.file.endswith(".png") else "jpeg")


Block = Text | Table | Picture


@dataclass(frozen=True)
class Section:
    """A heading and the blocks under it."""

    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Document:
    """A title, the question, the answer, and the sections that support it."""

    title: str
    question: str
    answer: list[str]
    sections: list[Section] = field(default_factory=list)

    @property
    def pictures(self) -> list[Picture]:
        """All pictures in the document."""
        blocks = [block for section in self.sections for block in section.blocks]
        return [block for block in blocks if isinstance(block, Picture)]


def data_uri(data: bytes, mime: str) -> str:
    """A "png" or "jpeg" picture as a data: URI, which an <img> shows without loading a file."""
    return f"data:image/{mime};base64,{base64.b64encode(data).decode()}"


def is_picture(data: bytes) -> bool:
    """Return whether `data` is an image file that can be read."""
    try:
        Image.open(io.BytesIO(data)).verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
    return True


def html(document: Document) -> str:
    """The document as one HTML file that loads nothing and has no script."""
    return render(TEMPLATE, document=document)


def render(template: str, **values) -> str:
    """Render a template of this folder; every text in it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["best"] = lambda cell: isinstance(cell, Best)
    return environment.get_template(template).render(values)


def markdown(document: Document) -> str:
    """The document as GitHub Markdown, which links to the pictures as files beside it."""
    parts = [f"# {escape(document.title)}", _paragraph(document.question)]
    parts += ["## Answer", *map(_paragraph, document.answer)]
    for section in document.sections:
        parts.append(f"## {escape(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def markdown_table(table: Table) -> str:
    """A table as Markdown."""
    rule = ["---" if i < table.text_columns else "---:" for i in range(len(table.headers))]
    lines = [map(escape, table.headers), rule, *(map(_cell, row) for row in table.rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def escape(text: str) -> str:
    """Escape `text` for a line of Markdown that shows it as it is, in or outside a table."""
    # without control characters, which could steer a terminal that shows the file
    line = "".join(c for c in " ".join(text.split()) if c.isprintable())
    # an underscore within a word has no meaning in Markdown
    line = re.sub(r"[\\`*\[\]|~]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9])", r"\\\g<0>", line)
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _cell(cell: str) -> str:
    return f"**{escape(cell)}**" if isinstance(cell, Best) else escape(cell)


def _block(block: Block) -> str:
    if isinstance(block, Table):
        return markdown_table(block)
    if isinstance(block, Picture):
        return f"![{escape(block.title)}]({block.file})\n\n{escape(block.caption)}"
    if block.kind == "code":
        # code by four spaces of indent, since the text could close a fence
        return "\n".join("    " + line for line in block.text.splitlines())
    return _paragraph(block.text)


def _paragraph(text: str) -> str:
    """Return `text` as a line that starts no list, heading or rule, however it begins."""
    return re.sub(r"^([#+=-]|\d+(?=[.)]))", _entity, escape(text))


def _entity(match: re.Match[str]) -> str:
    first, rest = match[0][0], match[0][1:]
    return f"&#{ord(first)};{rest}"
