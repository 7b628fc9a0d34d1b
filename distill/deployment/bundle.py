"""A folder of ONNX programs and the script that times them on another device, whose table deploy.table names here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill.deployment import measure
from distill.deployment.measure import FORMAT, RUNTIMES
from distill.deployment.runtimes import Runtime, Source
from distill.errors import ConfigError, one_of
from distill.storage.files import read_bytes, write_bytes, write_json

SCRIPT = "measure.py"


@dataclass(frozen=True)
class Group:
    """Programs that are timed in turn on batches of a size; of all but the first the difference to it is kept."""

    batch: int
    pieces: Sequence[tuple[str, Source]]  # what each is, in words

    @property
    def keys(self) -> tuple[object, ...]:
        """What tells it from other groups."""
        return self.batch, *(source.key for _, source in self.pieces)


def write_bundle(folder: Path, groups: Sequence[Group], runtime: Runtime) -> int:
    """Write a bundle into a folder; return the number of programs in it, each of which is there once.

    Raises ConfigError where the runtime takes no ONNX programs.
    """
    if runtime.name not in RUNTIMES:
        allowed = f"{one_of(RUNTIMES)}: a bundle holds ONNX programs"
        raise ConfigError("deploy.runtime", runtime.name, allowed)
    files: dict[str, str] = {}
    for group in groups:
        for _, source in group.pieces:
            if source.key not in files:
                files[source.key] = f"{len(files):03}.onnx"
                write_bytes(folder / files[source.key], source.program)
    alike = {group.keys: group for group in groups}  # blocks of the same shape are timed once
    table = [
        {
            "batch": group.batch,
            "pieces": [{"name": name, "key": source.key, "file": files[source.key]} for name, source in group.pieces],
        }
        for group in alike.values()
    ]
    how = {"runtime": runtime.name, "threads": runtime.threads, "precision": runtime.precision}
    write_json(folder / "bundle.json", {"format": FORMAT, **how, "groups": table})
    write_bytes(folder / SCRIPT, read_bytes(Path(str(measure.__file__))))
    return len(files)
