"""Text and numbers to HTML: escaping, tables, folded parts, sections. Knows nothing of runs."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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
    kind: str | None = None,
) -> Markup:
    """Return a table in a box of its own that scrolls where the page is narrow (or, if `tall`, the table long).

    `text` are the columns that are read as words (`long` the one with sentences); the others are numbers, aligned to
    the right. Rows of the kind "sorts" are alike, so that a reader may sort them.
    """

    def line(cell: str, column: int, name: str) -> Markup:
        words = "word long" if column == long else "word" if column in text else None
        return tag(name, cell, class_=words, scope="col" if name == "th" else None)

    head = join(*(line(heading, column, "th") for column, heading in enumerate(headings)))
    body = join(*(tag("tr", *(line(cell, column, "td") for column, cell in enumerate(row))) for row in rows))
    above = tag("thead", tag("tr", head)) if any(headings) else Markup()
    inner = tag("table", above, tag("tbody", body), class_=kind)
    return tag("div", inner, class_="scroll tall" if tall and len(rows) > 30 else "scroll", tabindex=0)


def facts(rows: Sequence[tuple[str, str]]) -> Markup:
    """Return names with their values."""
    return table(("", ""), rows, text=(0, 1))


def folded(title: str, *content: str, opened: bool = False) -> Markup:
    """Return a part of the page that is closed until the reader opens it."""
    return Markup(f"<details{' open' if opened else ''}>{tag('summary', title)}{join(*content)}</details>")


@dataclass(frozen=True)
class Section:
    """A titled part of a page that a link can lead to; one without content is left out."""

    title: str
    content: Markup
    note: str = ""

    @property
    def anchor(self) -> str:
        return "-".join(re.findall(r"[a-z0-9]+", self.title.lower()))

    @property
    def markup(self) -> Markup:
        note = tag("p", self.note, class_="note") if self.note else Markup()
        return tag("section", tag("h2", self.title), note, self.content, id=self.anchor)


def section(title: str, *content: str, note: str = "") -> Section:
    """Return a section of these parts."""
    return Section(title, join(*content), note)


def laid_out(sections: Iterable[Section]) -> Markup:
    """Return the sections that have content, after links to them."""
    shown = [one for one in sections if one.content]
    links = (tag("a", one.title, href=f"#{one.anchor}") for one in shown)
    return join(tag("nav", *links, aria_label="On this page"), *(one.markup for one in shown))
