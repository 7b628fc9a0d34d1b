"""The run directory: whose configuration it holds, which attempt this is, and which stages are complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.errors import ConfigError
from distill.files import read_json, write_json, write_text


class RunDirectory:
    """Paths and small records of one run. Rank 0 claims it; the others only read and write their own logs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def claim(self, identity: Mapping[str, Any], resolved_yaml: str) -> int:
        """Take the directory for this configuration and return the number of this attempt (its generation, from 1).

        Raises ConfigError on run.dir where another configuration's run lies there, before anything is written.
        """
        self.refuse_others(identity)
        try:
            for folder in ("logs", "metrics", "stages"):
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            allowed = f"a folder that can be written to ({error.strerror or error})"
            raise ConfigError("run.dir", str(self.path), allowed) from error
        write_json(self.path / "identity.json", dict(identity))
        write_text(self.path / "resolved.yaml", resolved_yaml)
        generation = 1 + int(read_json(self.path / "generation.json") or 0)
        write_json(self.path / "generation.json", generation)
        return generation

    def refuse_others(self, identity: Mapping[str, Any]) -> None:
        """Raise ConfigError on run.dir where another configuration's run, or something else, lies there."""
        found = read_json(self.path / "identity.json")
        if found is None and self.path.exists() and any(self.path.iterdir()):
            raise ConfigError("run.dir", str(self.path), "an empty or new directory, or an earlier run of this job")
        if found is not None and found != dict(identity):
            keys = sorted(key for key in found.keys() | identity.keys() if found.get(key) != identity.get(key))
            differing = ", ".join(f"{key}={found.get(key)!r} there, {identity.get(key)!r} here" for key in keys[:4])
            raise ConfigError("run.dir", str(self.path), f"a run of the same configuration; differing: {differing}")

    def result(self, stage: str) -> Any:
        """Return what a completed stage recorded, or None."""
        return read_json(self.path / "stages" / f"{stage}.json")

    def reopen(self, stage: str) -> None:
        """Forget that a stage is complete: it will be done again."""
        (self.path / "stages" / f"{stage}.json").unlink(missing_ok=True)

    def complete(self, stage: str, result: Any) -> None:
        """Record a stage as complete, after everything else that it writes."""
        write_json(self.path / "stages" / f"{stage}.json", result)
