"""Text and numbers to HTML: escaping, tables, folded parts. Knows nothing of runs."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any


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


def finite(value: Any) -> float | None:
    """Return a number that can be drawn; None for what is missing, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def show(value: Any, form: str = "{:,.2f}") -> str:
    """Return a number as text: "-" where it is missing, "not finite" for NaN and infinity."""
    if value is None:
        return "-"
    number = finite(value)
    return "not finite" if number is None else form.format(number)


def show_count(number: int, noun: str) -> str:
    """Return a number of things: 1 epoch, 2 epochs, 3 batches."""
    plural = noun + ("es" if noun.endswith("tch") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def show_seconds(value: Any) -> str:
    """Return seconds as a person would say them."""
    number = finite(value)
    if number is None:
        return show(value)
    for limit, form in ((0.1, f"{1000 * number:.1f} ms"), (10, f"{number:.2f} s"), (120, f"{number:.1f} s")):
        if abs(number) < limit:
            return form
    minutes, seconds = divmod(round(number), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def show_short(value: Any, unit: str = "") -> str:
    """Return a count with three digits and its power of a thousand: 73.1 k, 1.54 G."""
    number = finite(value)
    if number is None:
        return show(value)
    power = min(4, max(0, int(math.log10(abs(number)) // 3))) if number else 0
    scaled = number / 1000**power
    digits = 0 if power == 0 and number == int(number) else max(0, 2 - int(math.log10(max(1.0, abs(scaled)))))
    return f"{scaled:.{digits}f} {('', 'k', 'M', 'G', 'T')[power]}{unit}".strip()
