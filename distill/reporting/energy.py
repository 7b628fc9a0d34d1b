"""Joules by stage, image, rank and device; what could not be read is said with its reason, never shown as zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distill.observability.energy.joules import job_joules, joules_per_image
from distill.observability.numbers import finite, show
from distill.reporting.markup import Markup, join, table, tag
from distill.reporting.plot import bar, legend
from distill.reporting.run import STAGES, Run


def energy_section(run: Run) -> Markup:
    """Return the energy of a run as far as it was measured."""
    energy = run.energy
    reasons = [str(reason) for reason in energy.get("not_measured") or []]
    stages = {name: stage for name, stage in (energy.get("stages") or {}).items() if isinstance(stage, dict)}
    measured = {name: stage for name, stage in stages.items() if finite(stage.get("joules")) is not None}
    if not measured and not _known_devices(energy):
        reasons = reasons or ["this run kept no readings of energy"]
        return tag("p", tag("b", "not measured"), ": ", "; ".join(reasons))
    parts = [tag("p", _sum(run, measured))] if measured else []
    if reasons:
        parts.append(tag("p", tag("b", "Not measured"), ": ", "; ".join(reasons)))
    notes = [tag("p", str(note), class_="note") for note in energy.get("notes") or []]
    return join(*parts, *notes, _by_stage(stages), _by_rank(stages), _by_device(energy))


def show_joules(value: Any) -> str:
    """Return joules as text; "not measured" where there is no reading."""
    number = finite(value)
    if number is None:
        return "not measured"
    return f"{number:.3g} J" if abs(number) < 1000 else f"{number / 1000:,.3g} kJ"


def _sum(run: Run, measured: Mapping[str, Any]) -> str:
    text = f"{show_joules(job_joules(run.energy))} in the measured stages ({', '.join(measured)})"
    each = joules_per_image(run.energy, finite(run.energy.get("images")))["distill"]
    return text + (f", {show(1000 * each, '{:.3g}')} mJ an image of the distill stage." if each is not None else ".")


def _by_stage(stages: Mapping[str, Any]) -> Markup:
    if not stages:
        return Markup()
    most = max((finite(stage.get("joules")) or 0.0 for stage in stages.values()), default=0.0)
    order = sorted(stages, key=lambda name: STAGES.index(name) if name in STAGES else len(STAGES))
    rows = []
    for name in order:
        stage = stages[name]
        seconds, joules = finite(stage.get("seconds")), finite(stage.get("joules"))
        watts = show(joules / seconds, "{:,.0f}") if joules is not None and seconds else "-"
        gpu, cpu = (finite(stage.get(key)) or 0.0 for key in ("gpu_joules", "cpu_joules"))
        drawn = bar([(gpu, "gpu"), (cpu, "cpu")], whole=most, label=f"{name}: {show_joules(joules)}")
        kinds = [show_joules(stage.get(key)) for key in ("gpu_joules", "cpu_joules", "idle_devices_joules")]
        figures = (show(seconds, "{:,.1f}"), show_joules(joules), watts, *kinds)
        rows.append((name, drawn if joules is not None else "", *figures))
    headings = ("stage", "GPU and CPU", "seconds", "energy", "mean W", "GPUs", "CPUs", "idle devices, apart")
    return join(legend([("k gpu", "GPUs in use"), ("k cpu", "CPU packages")]), table(headings, rows, text=(0, 1)))


def _by_rank(stages: Mapping[str, Any]) -> Markup:
    ranks = sorted(
        {str(rank) for stage in stages.values() for rank in stage.get("ranks") or {}}, key=lambda r: (len(r), r)
    )
    if not ranks:
        return Markup()
    names = [name for name in STAGES if any((stages.get(name) or {}).get("ranks") or {})]
    rows = [
        (f"rank {rank}", *(show_joules((stages[name].get("ranks") or {}).get(rank)) for name in names))
        for rank in ranks
    ]
    return table(("", *names), rows, tall=True)


def _known_devices(energy: Mapping[str, Any]) -> bool:
    return any(
        finite(value) is not None for device in energy.get("devices") or [] for value in device["joules"].values()
    )


def _by_device(energy: Mapping[str, Any]) -> Markup:
    devices = [device for device in energy.get("devices") or [] if isinstance(device, dict)]
    if not devices:
        return Markup()
    rows = []
    for device in devices:
        readings = [finite(value) for value in (device.get("joules") or {}).values()]
        known = [value for value in readings if value is not None]
        ranks = ", ".join(map(str, device.get("ranks") or [])) or "none: idle"
        label = f"{str(device.get('kind', '')).upper()} {device.get('index', '')}"
        rows.append((label, str(device.get("name", "-")), str(device.get("host", "-")), ranks,
                     show_joules(sum(known) if known else None)))  # fmt: skip
    return table(("device", "name", "host", "ranks", "energy"), rows, text=(0, 1, 2, 3))
