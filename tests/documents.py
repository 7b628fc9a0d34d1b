"""The commands and programs that the documentation shows, so that tests run what a reader would."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


def fenced(page: str, language: str) -> list[str]:
    """Return the fenced code blocks of a page (its path in the repository) that are marked with `language`, in order.

    At least one: a test that runs none would prove nothing.
    """
    found = re.findall(rf"^```{re.escape(language)}\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    assert found, f"{page} shows no {language}"
    return found


class Example(NamedTuple):
    """What a page of docs/extending shows: a file of one's own, and by which name the page's command calls for it."""

    module: str
    attribute: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.module}:{self.attribute}"

    def written_to(self, folder: Path) -> Example:
        (folder / f"{self.module}.py").write_text(self.source)
        return self


def example(page: str) -> Example:
    """Return the one example of a page of docs/extending, which is called for by its first command."""
    path = f"docs/extending/{page}.md"
    (source,), (command, *_) = fenced(path, "python"), fenced(path, "sh")
    named = re.search(r"=(\w+):(\w+)", command)
    assert named, f"{path}: the command names no module:attribute"
    return Example(named[1], named[2], source)
