"""A document of paragraphs, tables and pictures, as Markdown and as one HTML file.

Every text in it may be hostile, since names of classes, files and data sets are: both forms escape.
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
    """A table's cell in bold."""

    __slots__ = ()


@dataclass(frozen=True)
class Text:
    """A paragraph; `kind` is "text", "note" (small) or "code"."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """Rows of cells under headers; the first `text_columns` are names, the others figures."""

    headers: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    text_columns: int = 1
    kind: str = "table"


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG with the name of its file, what it shows, and how to read it.

    `folded` pictures are shown on demand, where the form allows it.
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
    """A heading and what stands under it."""

    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Document:
    """A title, what is asked, what the answer is, and the sections that bear it out."""

    title: str
    question: str
    verdict: list[str]
    sections: list[Section] = field(default_factory=list)

    @property
    def pictures(self) -> list[Picture]:
        """All pictures in the document."""
        blocks = [block for section in self.sections for block in section.blocks]
        return [block for block in blocks if isinstance(block, Picture)]


def data_uri(data: bytes, mime: str) -> str:
    """A "png" or "jpeg" as a data: URI, which an <img> shows without fetching anything."""
    return f"data:image/{mime};base64,{base64.b64encode(data).decode()}"


def is_picture(data: bytes) -> bool:
    """Return whether `data` is an image file that can be read."""
    try:
        Image.open(io.BytesIO(data)).verify()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
    return True


def html(document: Document) -> str:
    """The document as one HTML file that fetches nothing and runs nothing."""
    return render(TEMPLATE, document=document)


def render(template: str, **values) -> str:
    """A page from a template of this folder, in which every text is escaped."""
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
    """The document as Markdown (GitHub's), its pictures as files beside it."""
    parts = [f"# {escape(document.title)}", _paragraph(document.question)]
    parts += ["## Answer", *map(_paragraph, document.verdict)]
    for section in document.sections:
        parts.append(f"## {escape(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def markdown_table(table: Table) -> str:
    """A table alone as Markdown."""
    rule = ["---" if i < table.text_columns else "---:" for i in range(len(table.headers))]
    lines = [map(escape, table.headers), rule, *(map(_cell, row) for row in table.rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def escape(text: str) -> str:
    """Escape `text` for a line of Markdown that shows it as it is, in or outside a table."""
    # and without what would steer a terminal that shows the file
    line = "".join(c for c in " ".join(text.split()) if c.isprintable())
    # an underscore within a word is none of Markdown's
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
        # four spaces make code of any text, where a fence could be closed from within
        return "\n".join("    " + line for line in block.text.splitlines())
    return _paragraph(block.text)


def _paragraph(text: str) -> str:
    """A line that starts no list, heading or rule, whatever its first word is."""
    return re.sub(r"^([#+=-]|\d+(?=[.)]))", _entity, escape(text))


def _entity(match: re.Match[str]) -> str:
    first, rest = match[0][0], match[0][1:]
    return f"&#{ord(first)};{rest}"
