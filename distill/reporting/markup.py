"""Text and numbers to HTML: escaping, tables, folded parts. Knows nothing of runs."""

from __future__ import annotations

import html
from collections.abc import Sequence


class Markup(str):
    """Text that is HTML already; every other string is escaped where it enters the page."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """Return `text` as HTML, unless it is HTML already."""
    if isinstance(text, Markup):
        return text
    return Markup(html.escape(str(text).encode(errors="backslashreplace").decode()))  # also what UTF-8 cannot name


def join(*parts: str) -> Markup:
    """Return the parts one after another as HTML."""
    return Markup("".join(escape(part) for part in parts))


def tag(name: str, *content: str, **attributes: object) -> Markup:
    """Return an element. Attribute names drop a final "_" and write "-" for "_"."""
    inside = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{inside}>{join(*content)}</{name}>")


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text: Sequence[int] = (0,),
    long: int = -1,
    tall: bool = False,
) -> Markup:
    """Return a table in a box of its own that scrolls where the page is narrow (or, if `tall`, the table long).

    `text` are the columns that are read as words (`long` the one with sentences); the others are numbers, aligned to
    the right.
    """

    def line(cell: str, column: int, name: str) -> Markup:
        kind = "word long" if column == long else "word" if column in text else None
        return tag(name, cell, class_=kind, scope="col" if name == "th" else None)

    head = join(*(line(heading, column, "th") for column, heading in enumerate(headings)))
    body = join(*(tag("tr", *(line(cell, column, "td") for column, cell in enumerate(row))) for row in rows))
    inner = tag("table", tag("thead", tag("tr", head)) if any(headings) else Markup(), tag("tbody", body))
    return tag("div", inner, class_="scroll tall" if tall and len(rows) > 30 else "scroll", tabindex=0)


def facts(rows: Sequence[tuple[str, str]]) -> Markup:
    """Return names with their values."""
    return table(("", ""), rows, text=(0, 1))


def folded(title: str, *content: str, opened: bool = False) -> Markup:
    """Return a part of the page that is closed until the reader opens it."""
    return Markup(f"<details{' open' if opened else ''}>{tag('summary', title)}{join(*content)}</details>")


def section(title: str, *content: str, note: str = "") -> Markup:
    """Return a titled section, or nothing where it has no content."""
    if not any(content):
        return Markup()
    return tag("section", tag("h2", title), tag("p", note, class_="note") if note else Markup(), *content)
