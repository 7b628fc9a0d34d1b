"""How two runs' identities differ, in words. Knows no configuration objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST = 4  # differences that are told
_WORDS = {
    "data.root (training images)": "the training images under data.root",
    "data.root (test images)": "the test images under data.root",
    "data.root": "the data under data.root",
    "teacher.weights": "the file teacher.weights",
    "teacher.factory (source)": "the source of teacher.factory",
    "teacher.source (version)": "the library of the teacher's architecture",
    "results": "the version of what distill computes",
}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return what differs between the identity of a run that is there and of the job that is asked for here."""
    if "results" in here and "results" not in there:
        return "it is of an earlier version of distill, which did not note what images and weights it was made from"
    keys = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
    told = [f"{_named(key, there, here)}{_shown(key, there)} there, {_shown(key, here)} here" for key in keys[:MOST]]
    more = f"; and {len(keys) - MOST} more" if len(keys) > MOST else ""
    return f"differing: {'; '.join(told)}{more}"


def _named(key: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The setting, or what it names where that is what differs."""
    is_setting = key in ("teacher.weights", "data.root") and not any(
        "content" in str(f.get(key)) for f in (there, here)
    )
    return f"{key}=" if is_setting or key not in _WORDS else f"{_WORDS[key]}: "


def _shown(key: str, facts: Mapping[str, Any]) -> str:
    """The value as it is typed on the command line."""
    value = facts.get(key)
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value) if "content" in str(value) else repr(value)
