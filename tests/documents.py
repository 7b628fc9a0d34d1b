"""The commands and programs that the documentation shows, so that tests run what a reader would."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def fenced(page: str, language: str) -> list[str]:
    """Return the fenced code blocks of a page (its path in the repository) that are marked with `language`, in order.

    At least one: a test that runs none would prove nothing.
    """
    found = re.findall(rf"^```{re.escape(language)}\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    assert found, f"{page} shows no {language}"
    return found
