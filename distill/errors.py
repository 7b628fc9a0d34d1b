"""The errors a user can cause, with the words to mend them. Knows nothing else of the package."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DistillError(Exception):
    """Base of every error this package raises on purpose; its message is meant for the user, without a traceback."""


class ConfigError(DistillError):
    """A setting that cannot be honoured: names the setting, what was given and what is allowed.

    `setting` is the dotted override path as the user types it, for example "data.root".
    """

    def __init__(self, setting: str, given: object, allowed: str) -> None:
        super().__init__(f"{setting}: got {given!r}; expected {allowed}")
        self.setting = setting


class UnknownSettingError(ConfigError):
    """A setting that does not exist: names those that do."""

    def __init__(self, setting: str, allowed: str) -> None:
        DistillError.__init__(self, f"{setting}: this setting does not exist; expected {allowed}")
        self.setting = setting


def one_of(choices: Iterable[str], given: object = "") -> str:
    """Return "one of a, b, c", led by the nearest choice when `given` looks like a typing error."""
    names = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(given), names, n=1)
    hint = f"{near[0]!r} (the nearest), or " if near else ""
    return f"{hint}one of {', '.join(names)}"


def install(extra: str) -> str:
    """Return how an extra is installed. Not by the project's name: package indexes know another project by it."""
    return f"pip install -e '.[{extra}]' in the folder of distill's source"
