"""What a run directory tells, read so that nothing missing, damaged or half written costs the report. No torch."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from distill.errors import DistillError
from distill.observability.energy.joules import summarize
from distill.observability.numbers import finite
from distill.observability.trace import RankTrace
from distill.observability.trace import read as read_traces
from distill.storage.files import DamagedFileError, read_bytes, read_json, read_lines

TRAINING = ("halving_1", "halving_2", "halving_3")  # stages of runs that train candidates before they choose
CHOOSING = ("candidates", *TRAINING, "search")  # stages of runs that choose recipes under budgets
STAGES = ("teacher", *CHOOSING, "first_weights", "plan", "distill", "assemble", "finetune", "evaluate", "deliver")
MARKS = ("resolved.yaml", "identity.json", "ledger.jsonl", "metrics.json")  # any of them makes a run directory
EXPECTED = "a run directory (the one that the run printed, with resolved.yaml in it) or a folder with some below it"
LAST_LINES = 12  # of a log


class NoRunError(DistillError):
    """A path given to the report holds no run."""


@dataclass
class UnitState:
    """How far one unit is. Errors are relative; `seconds` are of its training; `course` has (step, relative error)."""

    unit: int
    name: str
    rank: int | None = None
    status: str = "not begun"
    steps: int = 0
    budget: int | None = None
    first_error: float | None = None
    last_error: float | None = None
    seconds: float | None = None
    predicted_step_s: float | None = None
    entry: Mapping[str, Any] | None = None
    course: list[tuple[int, float]] = field(default_factory=list)

    @property
    def step_s(self) -> float | None:
        """Measured seconds of one step."""
        return self.seconds / self.steps if self.seconds is not None and self.steps else None


class Run:
    """A run directory as its files are now. Every part may be missing."""

    def __init__(self, path: Path) -> None:
        if not is_run(path):
            raise NoRunError(f"{path}: no run is there; expected {EXPECTED}")
        self.path = path
        self.damaged: list[str] = []  # what has been left out so far, in words

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """What was delivered; nothing where the file is not the one that the deliver stage has recorded."""
        recorded = _mapping(self._json("stages/deliver.json").get("made")).get("metrics.json")
        content = self._content("metrics.json") if recorded else None
        if content is not None and hashlib.sha256(content).hexdigest() != recorded:
            self.damaged.append(f"{self.path / 'metrics.json'}: damaged, or another run's")
            return {}
        return self._json("metrics.json")

    @cached_property
    def costs(self) -> dict[str, Any]:
        return self._json("costs.json")

    @cached_property
    def plan(self) -> dict[str, Any]:
        return self._json("plan.json")

    @cached_property
    def settings_text(self) -> str:
        return (self._content("resolved.yaml") or b"").decode(errors="replace")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The whole configuration, by dotted name."""
        try:
            written = OmegaConf.create(self.settings_text)
            return dict(_flat(OmegaConf.to_container(written, resolve=True))) if self.settings_text else {}
        except Exception:  # the parser's errors have no common base; the text itself is shown in any case
            return {}

    @cached_property
    def order(self) -> tuple[str, ...]:
        """The stages that the run has, in their order."""
        searched = any(value is not None for name, value in self.settings.items() if name.startswith("search.budget."))
        left_out = () if searched and finite(self.settings.get("search.steps")) else TRAINING if searched else CHOOSING
        return tuple(stage for stage in STAGES if stage not in left_out)

    @cached_property
    def stages(self) -> dict[str, dict[str, Any]]:
        """What the complete stages recorded."""
        found = {stage: self._json(f"stages/{stage}.json") for stage in self.order}
        return {stage: _mapping(record.get("result")) for stage, record in found.items() if record}

    @cached_property
    def finetune_epochs(self) -> Any:
        """The epochs of fine-tuning that were asked for, or that a budget in time gave."""
        given = _mapping(self._json("stages/finetune_epochs.json").get("result"))
        return given.get("epochs", self.settings.get("finetune.epochs"))

    @cached_property
    def attempts(self) -> int:
        return int(finite(self._json("generation.json").get("generation")) or 1)

    @cached_property
    def traces(self) -> list[RankTrace]:
        """Every rank's latest trace of the latest attempt that trained blocks."""
        everything = self.all_traces
        trained = [t.generation for t in everything if any(span.kind == "student" for span in t.spans)]
        return [trace for trace in everything if trained and trace.generation == max(trained)]

    @cached_property
    def all_traces(self) -> list[RankTrace]:
        found, files = read_traces(self.path), len([*(self.path / "traces").glob("rank*.json")])
        if len(found) < files:
            self.damaged.append(f"{self.path / 'traces'}: {files - len(found)} of {files} files are damaged")
        return found

    @cached_property
    def ledger(self) -> dict[int, dict[str, Any]]:
        """The finished units, by number; where one was recorded again, its last line."""
        lines = [*self._lines("ledger.jsonl")] or self.metrics.get("blocks", [])
        return {number: line for line in lines if (number := _unit_of(line)) is not None}

    @property
    def finished(self) -> bool:
        """Whether the student was delivered."""
        return "student" in self.metrics and "teacher" in self.metrics

    def done(self, stage: str) -> bool:
        """Whether a stage is complete; the page is drawn by the last one, just before that is recorded."""
        if self.finished or stage in self.stages:
            return True
        following = self.order[self.order.index(stage) + 1 :]
        planned = bool(self.plan) and "distill" in following
        return planned or any(later in self.stages for later in following)

    @property
    def current_stage(self) -> str | None:
        """The first stage that is not complete; None at the end."""
        return next((stage for stage in self.order if not self.done(stage)), None)

    @cached_property
    def units(self) -> list[UnitState]:
        """Everything that is trained, in order: a student for every block that gets one, and other units after them."""
        states: dict[int, UnitState] = {}
        blocks = self.costs.get("blocks", [])
        units = {unit["number"]: unit["name"] for unit in self.costs.get("units", [])}

        def state(number: int) -> UnitState:
            name = blocks[number] if number < len(blocks) else f"block {number}"
            return states.setdefault(number, UnitState(number, units.get(number, name)))

        for span in self.plan.get("spans", []):
            if (number := _unit_of(span)) is not None:
                state(number).budget = span["budget"]
        for rank, owned in enumerate(self.plan.get("owners", [])):
            for number in owned:
                state(number).rank = rank
        for number, readings in self._readings().items():
            _take_readings(state(number), readings)
        for number, entry in self.ledger.items():
            _take_entry(state(number), entry)
        predicted = _mapping(self.costs.get("seconds")).get("student", [])
        for number, one in states.items():
            one.predicted_step_s = (finite(predicted[number]) or None) if number < len(predicted) else None
        return [states[number] for number in sorted(states)]

    def _readings(self) -> dict[int, dict[int, tuple[int, dict[str, Any]]]]:
        """Unit -> step -> (rank, reading); a step that was done again counts as it was done last."""
        found: dict[int, dict[int, tuple[int, dict[str, Any]]]] = {}
        every = [
            (int(re.sub(r"\D", "", file.stem) or 0), line)
            for file in sorted((self.path / "metrics").glob("rank*.jsonl"))
            for line in self._lines(f"metrics/{file.name}")
            if _unit_of(line) is not None and finite(line.get("step")) is not None
        ]
        for rank, line in sorted(every, key=lambda item: item[1].get("generation") or 0):
            found.setdefault(_unit_of(line) or 0, {})[int(line["step"])] = rank, line
        return found

    @cached_property
    def errors(self) -> list[tuple[str, list[str]]]:
        """(log file, its last lines) of every rank that told an error in the latest attempt."""
        begun = self._attempt_begun()
        found = []
        for file in self.logs:
            lines = self._log(file)
            told = [
                n for n, line in enumerate(lines) if re.search(r"\] (ERROR|CRITICAL) ", line) and line[:19] >= begun
            ]
            if told:
                story = lines[told[0] :]
                found.append(
                    (
                        f"logs/{file.name}",
                        [*story[:2], "...", *story[-LAST_LINES:]] if len(story) > 2 + LAST_LINES else story,
                    )
                )
        return found

    @cached_property
    def last_lines(self) -> list[tuple[str, list[str]]]:
        """(log file, its last lines) of every rank."""
        return [(f"logs/{f.name}", self._log(f)[-LAST_LINES:]) for f in self.logs]

    @cached_property
    def logs(self) -> list[Path]:
        return sorted((self.path / "logs").glob("rank*.log"), key=lambda file: (len(file.name), file.name))

    @property
    def last_sign_s(self) -> float | None:
        """Seconds of the epoch when a rank last wrote to its log or its readings."""
        files = [*self.logs, *(self.path / "metrics").glob("rank*.jsonl")]
        return max((file.stat().st_mtime for file in files), default=None)

    def _attempt_begun(self) -> str:
        """The time, as the logs write it, at which the latest attempt claimed the directory."""
        begun = ""
        for file in self.logs[:1]:
            for line in self._log(file):
                if re.search(r"run directory: .* \(attempt \d+\)$", line):
                    begun = line[:19]
        return begun

    @cached_property
    def energy(self) -> dict[str, Any]:
        """What joules.summarize() says now, or as metrics.json has it where the readings are gone."""
        kept = _mapping(self.metrics.get("energy"))
        readings = any((self.path / "metrics").glob("energy-*.jsonl"))
        return kept | summarize(self.path) if readings else kept

    @property
    def title(self) -> str:
        """The teacher and the data."""
        teacher = _mapping(self.metrics.get("teacher")).get("name") or self.settings.get("teacher.name")
        data = _mapping(self.metrics.get("data")).get("name") or self.settings.get("data.name")
        return f"{teacher} on {data}" if teacher and data else self.path.name

    @property
    def world_size(self) -> int | None:
        value = _mapping(self.metrics.get("distill")).get("world_size")
        return int(value) if value else len(self.plan.get("owners", [])) or None

    def part(self, name: str) -> dict[str, Any]:
        """Return a section of metrics.json, or of its stage's record where there are no metrics yet."""
        return _mapping(self.metrics.get(name)) or self.stages.get(name, {})

    @cached_property
    def stage_seconds(self) -> dict[str, float]:
        """Seconds of every stage: of all attempts where there are traces, else as energy or the stage tell them."""
        found: dict[str, float] = {}
        for stage in self.order:
            # metrics.json calls the teacher's network "teacher", not its training
            record = self.stages.get(stage) or ({} if stage == "teacher" else self.part(stage))
            seconds = finite(record.get("seconds"))
            if seconds is None and record.get("epochs"):
                seconds = sum(finite(epoch.get("seconds")) or 0.0 for epoch in record["epochs"])
            energy = finite(_mapping(_mapping(self.energy.get("stages")).get(stage)).get("seconds"))
            spans = [
                s for t in self.all_traces if t.rank == 0 for s in t.spans if s.kind == "stage" and s.name == stage
            ]
            best = sum(span.seconds for span in spans) or energy or seconds
            if best is not None:
                found[stage] = best
        return found

    def _json(self, name: str) -> dict[str, Any]:
        """The object in a file; none where there is no such file, or a damaged one."""
        try:
            return _mapping(read_json(self.path / name))
        except DamagedFileError as damage:
            self._leave_out(damage)
            return {}

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The objects of a .jsonl file; what is damaged, or half written by a killed rank, is left out."""
        for line in read_lines(self.path / name):
            if isinstance(line, DamagedFileError):
                self._leave_out(line)
            else:
                yield line

    def _log(self, file: Path) -> list[str]:
        return (self._content(f"logs/{file.name}") or b"").decode(errors="replace").splitlines()

    def _content(self, name: str) -> bytes | None:
        if not (self.path / name).exists():
            return None
        try:
            return read_bytes(self.path / name)
        except DamagedFileError as damage:
            self._leave_out(damage)
            return None

    def _leave_out(self, damage: DamagedFileError) -> None:
        if str(damage) not in self.damaged:
            self.damaged.append(str(damage))


def is_run(path: Path) -> bool:
    """Whether a run has been there."""
    return any((path / name).exists() for name in MARKS)


def runs_below(path: Path, *, depth: int = 4) -> list[Path]:
    """Return the run directories at or below a path, by name."""
    if is_run(path):
        return [path]
    if depth == 0 or not path.is_dir():
        return []
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return [run for folder in folders for run in runs_below(folder, depth=depth - 1)]


def _unit_of(line: Mapping[str, Any]) -> int | None:
    """Return the number of the unit that a line is about; earlier versions had the block's alone."""
    number = finite(line.get("unit", line.get("block")))
    return None if number is None else int(number)


def _take_readings(state: UnitState, readings: Mapping[int, tuple[int, dict[str, Any]]]) -> None:
    steps = sorted(readings)
    state.course = [(step, _number(readings[step][1].get("relative_error"))) for step in steps]
    rank, last = readings[steps[-1]]
    state.rank, state.status, state.steps = rank, "training", steps[-1]
    state.first_error, state.last_error = finite(state.course[0][1]), state.course[-1][1]
    state.seconds = finite(last.get("seconds"))


def _take_entry(state: UnitState, entry: Mapping[str, Any]) -> None:
    state.entry, state.name = entry, str(entry.get("name", state.name))
    state.rank, state.status = entry.get("rank"), str(entry.get("status", "finished"))
    state.steps = int(finite(entry.get("steps")) or 0)
    state.first_error, state.last_error = entry.get("rel_error_first"), entry.get("rel_error_last")
    state.seconds = finite(entry.get("seconds"))


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
