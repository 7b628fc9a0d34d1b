"""Timings kept by what was timed, so that nothing is timed twice: in a folder of this machine's user, or in a table
that was measured on another device.

A key says which program and which batch; the environment (runtime, version, threads, precision, processor) is a
folder's name, and a table's head.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from distill.deployment.measure import FORMAT, Timing
from distill.errors import ConfigError
from distill.storage.files import DamagedFileError, DiskError, read_json, write_json
from distill.storage.paths import expanded

log = logging.getLogger(__name__)

ASKED = ("runtime", "threads", "precision")  # of a table's environment, also settings of the section deploy


class Timings(Protocol):
    """Timings by key."""

    def get(self, key: str, what: str) -> Timing | None:
        """Return the timing of `what` (in words); None where it is to be measured, here."""

    def put(self, key: str, timing: Timing) -> None:
        """Keep a timing."""


def cache_folder() -> Path:
    """Return where timings are kept: distill/latency in $XDG_CACHE_HOME, else in ~/.cache."""
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "distill" / "latency"


class KeptHere:
    """Timings of this machine: a file each, so that several jobs may add to them at once."""

    def __init__(self, environment: Mapping[str, Any], folder: Path | None = None) -> None:
        facts = json.dumps({"format": FORMAT, **environment}, sort_keys=True)
        self.folder = (folder or cache_folder()) / hashlib.sha256(facts.encode()).hexdigest()[:16]
        self._environment, self._known = environment, dict[str, Timing]()

    def get(self, key: str, what: str) -> Timing | None:
        if key not in self._known:
            try:
                found = read_json(self._file(key))
                if found is not None:
                    self._known[key] = Timing(**found["timing"])
            except (DamagedFileError, KeyError, TypeError) as damage:
                log.warning("latency: %s is measured again: %s", what, damage)
        return self._known.get(key)

    def put(self, key: str, timing: Timing) -> None:
        self._known[key] = timing
        try:
            write_json(self._file(key), {"environment": self._environment, "timing": asdict(timing)})
        except DiskError as error:
            log.warning("latency: a timing is not kept for other jobs: %s", error)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key.replace('/', '-over-')}.json"


class MeasuredElsewhere:
    """The table that a bundle's measure.py wrote on another device. Raises ConfigError on deploy.table."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            table = json.loads(path.read_bytes())
            self.environment: dict[str, Any] = dict(table["environment"])
            self._timings = {key: Timing(**timing) for key, timing in table["timings"].items()}
            fits = table["format"] == FORMAT
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._refusal(
                f"the table that a bundle's measure.py wrote ({type(error).__name__}: {error})"
            ) from error
        if not fits:
            raise self._refusal(f"a table of format {FORMAT}: make the bundle again with this version")

    def check(self, asked: Mapping[str, Any]) -> None:
        """Raise where it was measured with another runtime, or with other threads or precision, than `asked`."""
        for name in ASKED:
            own = self.environment.get(name)
            if asked.get(name) not in (None, own):
                raise ConfigError(f"deploy.{name}", asked[name], f"{own}, as {self.path} was measured")

    def get(self, key: str, what: str) -> Timing | None:
        if key not in self._timings:
            raise self._refusal(
                f"a table that has {what}; make the bundle again (python -m distill latency bundle) and measure there"
            )
        return self._timings[key]

    def known(self, key: str) -> Timing | None:
        """Return a timing, None where the table has it not."""
        return self._timings.get(key)

    def put(self, key: str, timing: Timing) -> None:
        raise AssertionError("nothing is measured here for another device")

    def _refusal(self, allowed: str) -> ConfigError:
        return ConfigError("deploy.table", str(self.path), allowed)
