"""HTML from Python calls: everything that is not `Markup` is escaped, and every tag is closed."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence

VOID = frozenset({"img", "meta", "br", "wbr"})
MIME = {"svg": "image/svg+xml", "png": "image/png"}


class Markup(str):
    """Text that is HTML already."""


Content = str | int | None


def join(*parts: Content) -> Markup:
    """One piece of HTML; plain text is escaped, ``None`` is nothing."""
    return Markup("".join(p if isinstance(p, Markup) else html.escape(str(p)) for p in parts if p is not None))


def element(tag: str, *children: Content, **attributes: str | int | None) -> Markup:
    """``<tag ...>children</tag>``.

    Args:
        tag: name; elements of `VOID` have no children.
        children: plain text is escaped.
        attributes: values are escaped, ``None`` leaves one out; ``class_`` is ``class``, ``data_x`` is ``data-x``.
    """
    shown = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{shown}>" if tag in VOID else f"<{tag}{shown}>{join(*children)}</{tag}>")


def breakable(name: str) -> Markup:
    """A long name that may wrap after ``_``, ``/`` and ``-``."""
    pieces = re.split(r"(?<=[_/-])", name)
    return Markup("<wbr>".join(html.escape(piece) for piece in pieces if piece))


def paragraph(*children: Content, class_: str | None = None) -> Markup:
    """``<p>``."""
    return element("p", *children, class_=class_)


def missing(text: str) -> Markup:
    """One line in the place of what is not there."""
    return paragraph(text, class_="missing")


def counted(number: int, noun: str = "case") -> str:
    """``1 case``, ``2 cases``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def unordered(items: Sequence[Content], class_: str | None = None) -> Markup:
    """Bulleted list."""
    return element("ul", *(element("li", item) for item in items), class_=class_)


def section(identifier: str, title: str, *children: Content) -> Markup:
    """Section with a heading that links can reach."""
    heading = element("h2", title, id=f"{identifier}-title")
    return element("section", heading, *children, id=identifier, aria_labelledby=f"{identifier}-title")


def details(summary: str, *children: Content) -> Markup:
    """Content that is folded in until asked for."""
    return element("details", element("summary", summary), *children)


def table(caption: str, header: Sequence[Content], rows: Sequence[Sequence[Content]], numeric: bool = True) -> Markup:
    """Table whose first column names the rows; it scrolls by itself where the screen is narrow.

    Args:
        caption: what the table shows.
        header: one entry per column.
        rows: of as many cells as the header, or of a single one that heads the rows below it.
        numeric: align the cells to the right.
    """
    head = element("tr", *(element("th", cell, scope="col") for cell in header))
    body = []
    for first, *cells in rows:
        if cells:
            body.append(element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in cells)))
        else:
            body.append(element("tr", element("th", first, colspan=len(header), scope="colgroup"), class_="group"))
    content = element(
        "table", element("caption", element("span", caption)), element("thead", head), element("tbody", *body),
        class_="numbers" if numeric else None,
    )  # fmt: skip
    return element("div", content, class_="scroll", role="region", aria_label=caption, tabindex=0)


def figure(content: bytes, kind: str, alt: str, caption: Content = None, class_: str = "chart") -> Markup:
    """Picture as data URI, with alternative text and caption.

    Args:
        content: the file.
        kind: ``svg`` or ``png``.
        alt: what a reader who cannot see it should know.
        caption: below it.
        class_: ``chart`` (colours may be inverted on dark screens) or ``photo``.
    """
    data = base64.b64encode(content).decode("ascii")
    image = element("img", src=f"data:{MIME[kind]};base64,{data}", alt=alt, class_=class_)
    return element("figure", image, None if caption is None else element("figcaption", caption))
