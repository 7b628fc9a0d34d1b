"""The run directory: whose configuration it holds, which attempt this is, and which stages are complete.

A stage's record names the files that the stage made, and those of earlier stages that it used, by their sha256. So a
file that is damaged, missing or another run's is noticed, its stage alone is done again, and later stages stand where
that comes to the same bits. JSON files carry checksums of their own (distill/files.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.errors import ConfigError
from distill.storage.differing import differences
from distill.storage.files import (
    DamagedFileError,
    file_digest,
    read_bytes,
    read_json,
    write_commented,
    write_json,
)
from distill.storage.lease import LOCK, RECORD, HeldError, Lease

log = logging.getLogger(__name__)

FOLDERS = ("logs", "metrics", "stages")  # that a claim makes
STAGES = (
    "teacher",
    "candidates",
    "halving_1",
    "halving_2",
    "halving_3",
    "search",
    "block_steps",
    "first_weights",
    "distill",
    "assemble",
    "finetune_epochs",
    "pace",
    "finetune",
    "evaluate",
    "int8",
    "deliver",
)  # those that leave a record


class RunDirectory:
    """Paths and small records of one run. Rank 0 claims it; the others only read and write their own logs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lease: Lease | None = None
        self.mended: list[str] = []  # what claim() has found damaged, in words

    def claim(self, identity: Mapping[str, Any], resolved_yaml: str) -> int:
        """Take the directory for this configuration and return the number of this attempt (its generation, from 1).

        Raises ConfigError on run.dir where another configuration's run lies there, before anything is written, or where
        another job works. What is damaged is written again, or its stage is forgotten, and `mended` tells of it.
        """
        self.refuse_others(identity)
        try:
            for folder in FOLDERS:
                (self.path / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            allowed = f"a folder that can be written to ({error.strerror or error})"
            raise ConfigError("run.dir", str(self.path), allowed) from error
        try:
            self._lease = Lease(self.path)
        except HeldError as error:
            allowed = (
                f"a folder in which no other job works: {error.holder} does; wait for its end, or stop it, or set "
                "run.dir or run.tag"
            )
            raise ConfigError("run.dir", str(self.path), allowed) from error
        try:
            return self._take(identity, resolved_yaml)
        # whatever it is: the process may go on after the job (api.py), and the lock would go on with it
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let other jobs have the directory."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def _take(self, identity: Mapping[str, Any], resolved_yaml: str) -> int:
        """Write what says whose the directory is, now that nobody else does."""
        self.mended = []
        # before any stage is reopened: what is another run's stays as it is
        self.refuse_others(identity)
        for stage, damage in self.damaged():
            if damage.path.is_dir():
                raise damage
            self.reopen(stage)
            self.mended.append(f"stage {stage} is done again: {damage}")
        generation = 1 + self._last_generation()
        write_json(self.path / "identity.json", identity)
        write_commented(self.path / "resolved.yaml", resolved_yaml)
        write_json(self.path / "generation.json", {"generation": generation, "identity": _digest(identity)})
        return generation

    def refuse_others(self, identity: Mapping[str, Any]) -> None:
        """Raise ConfigError on run.dir where another configuration's run, or something else, lies there.

        Where identity.json is damaged or missing, generation.json has its digest.
        """
        try:
            found = read_json(self.path / "identity.json")
        except DamagedFileError as damage:
            if damage.path.is_dir() or self._claimed_for() != _digest(identity):
                raise
            self.mended.append(f"it is written anew: {damage}")
            return
        if found is None and self.path.exists() and not self._untouched():
            if self._claimed_for() == _digest(identity):
                self.mended.append(f"it is written anew: {self.path / 'identity.json'}: missing")
                return
            raise ConfigError("run.dir", str(self.path), "an empty or new directory, or an earlier run of this job")
        if found is not None and found != _plain(identity):
            allowed = f"a run of the same configuration; {differences(found, identity)}"
            raise ConfigError("run.dir", str(self.path), allowed)

    def _untouched(self) -> bool:
        """Whether the directory is empty but for what a claim makes first, and may have come no further."""
        return all(
            entry.name in (LOCK, RECORD) or (entry.name in FOLDERS and not any(entry.iterdir()))
            for entry in self.path.iterdir()
        )

    def result(self, stage: str) -> Any:
        """Return what a completed stage recorded, or None."""
        record = self._record(stage)
        return None if record is None else record["result"]

    def complete(self, stage: str, result: Any, *, made: Sequence[str] = (), used: Sequence[str] = ()) -> None:
        """Record a stage as complete, after everything else that it writes: the files (names in this directory) that it
        made, and those of earlier stages that it used.

        Later stages that used other bits than those that were made now are forgotten.
        """
        if self._lease is not None:
            self._lease.check()
        digests = {name: file_digest(self.path / name) for name in made}
        # Later stages are forgotten before this one is recorded: a crash between leaves too little recorded, never too
        # much.
        for other in STAGES:
            record = self._record(other) or {"used": {}}
            changed = [name for name in digests if record["used"].get(name, digests[name]) != digests[name]]
            if changed:
                log.warning("stage %s is done again: it used another %s", other, changed[0])
                self.reopen(other)
        record = {"result": result, "made": digests, "used": self.digests(used)}
        write_json(self._record_file(stage), record)

    def reopen(self, stage: str) -> None:
        """Forget that a stage is complete: it will be done again."""
        self._record_file(stage).unlink(missing_ok=True)

    def read(self, name: str) -> bytes:
        """Return the content of a file that a complete stage made. Raises DamagedFileError where it is another."""
        content = read_bytes(self.path / name)
        if hashlib.sha256(content).hexdigest() != self.digests([name]).get(name):
            raise DamagedFileError(self.path / name, "damaged: it is not the file that was made here; start again")
        return content

    def digests(self, names: Sequence[str] = ()) -> dict[str, str]:
        """Return the recorded sha256 of those files that complete stages made."""
        made: dict[str, str] = {}
        for stage in STAGES:
            made |= (self._record(stage) or {"made": {}})["made"]
        return {name: made[name] for name in names if name in made}

    def origin(self, *names: str) -> str:
        """Return what tells work that begins with these files of this run from any other."""
        return _digest({"identity": read_json(self.path / "identity.json"), "files": self.digests(names)})

    def damaged(self) -> Iterator[tuple[str, DamagedFileError]]:
        """Yield the stages that are recorded as complete and are not, with the reason: their record is damaged, or a
        file that they made is, or one that they used is not the one that is there."""
        made: dict[str, str] = {}
        for stage in STAGES:
            try:
                record = read_json(self._record_file(stage))
                if record is None:
                    continue
                for name, digest in record["made"].items():
                    if file_digest(self.path / name) != digest:
                        why = f"damaged, or another run's: it is not the file that {self._record_file(stage)} tells of"
                        raise DamagedFileError(self.path / name, why)
                for name, digest in record["used"].items():
                    if made.get(name, digest) != digest:
                        raise DamagedFileError(self._record_file(stage), f"it used another {name}")
                made |= record["made"]
            except DamagedFileError as damage:
                yield stage, damage

    def _record(self, stage: str) -> dict[str, Any] | None:
        """Return a stage's record; a damaged one counts for nothing, and damaged() tells of it."""
        try:
            found: dict[str, Any] | None = read_json(self._record_file(stage))
        except DamagedFileError:
            return None
        return found

    def _record_file(self, stage: str) -> Path:
        return self.path / "stages" / f"{stage}.json"

    def _claimed_for(self) -> str | None:
        """Return the digest of the identity that the directory was last claimed for, where that can be read."""
        try:
            found = read_json(self.path / "generation.json")
        except DamagedFileError:
            return None
        return None if found is None else found["identity"]

    def _last_generation(self) -> int:
        """Return the number of the last attempt; its trace has it too."""
        recorded = 0
        try:
            recorded = (read_json(self.path / "generation.json") or {"generation": 0})["generation"]
        except DamagedFileError as damage:
            if damage.path.is_dir():
                raise
            self.mended.append(f"it is written anew: {damage}")
        names = [re.fullmatch(r"rank\d+\.(\d+)\.json", path.name) for path in (self.path / "traces").glob("rank*.json")]
        return max(recorded, *(int(name[1]) for name in names if name), 0)


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object as it is read back."""
    return dict(json.loads(json.dumps(value)))


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()[:16]
