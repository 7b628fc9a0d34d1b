"""How fast teacher and student are, as a run's metrics tell it: the delivered files in the runtime that will run them;
of runs before there was such a measurement, and where it failed, the eager networks in PyTorch, named as such."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill.observability.numbers import finite, show, show_count
from distill.reporting.markup import Markup, table

EAGER = "eager"
EAGER_BATCHES = (1, 64)
NAMES = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "torch": "eager PyTorch",
    "torch_compile": "torch.compile",
}


@dataclass(frozen=True)
class Speed:
    """Milliseconds of a call on a batch, of both networks."""

    batch: int
    teacher: float | None
    student: float | None

    @property
    def images(self) -> str:
        return "one image" if self.batch == 1 else f"{self.batch} images"


def in_runtime(metrics: Mapping[str, Any]) -> list[Speed]:
    """Return what was measured in the runtime that will run the student, by batch; nothing where nothing was."""
    return speeds_of(_mapping(metrics.get("latency")))


def speeds_of(latency: Mapping[str, Any]) -> list[Speed]:
    """Return what a section `latency` of metrics.json has measured, by batch."""
    batches = _mapping(latency.get("batches"))
    return [
        Speed(
            int(batch), *(finite(_mapping(_mapping(one).get(side)).get("median_ms")) for side in ("teacher", "student"))
        )
        for batch, one in sorted(batches.items(), key=lambda item: int(item[0]))
    ]


def in_eager(metrics: Mapping[str, Any]) -> list[Speed]:
    """Return what was measured in eager PyTorch as the job ran it."""
    sides = [_mapping(metrics.get(side)) for side in ("teacher", "student")]
    return [Speed(size, *(finite(side.get(f"latency_ms_batch{size}")) for side in sides)) for size in EAGER_BATCHES]


def speeds(metrics: Mapping[str, Any]) -> list[Speed]:
    """Return what answers whether the student is faster."""
    return in_runtime(metrics) or in_eager(metrics)


def runtime_words(metrics: Mapping[str, Any]) -> str:
    """Return in what speeds() were measured and on what, for a sentence: "ONNX Runtime 1.31.1 on CPU, 1 thread"."""
    latency = _mapping(metrics.get("latency"))
    if not in_runtime(metrics):
        where = device_of(metrics)
        return f"eager PyTorch{f' on {where}' if where else ''}"
    name, precision = str(latency.get("runtime")), str(latency.get("precision", "fp32"))
    return (
        f"{NAMES.get(name, name)} {latency.get('version', '')} ({precision}, "
        f"{show_count(int(latency.get('threads', 1)), 'thread')}) on {latency.get('gpu') or latency.get('cpu')}"
    )


def device_of(metrics: Mapping[str, Any]) -> str:
    """Return the model of what the job's last attempt ran on."""
    environment = _mapping(metrics.get("environment"))
    device = environment.get("device")
    return str((environment.get("cpu") if device == "cpu" else None) or device or "")


def latency_rows(metrics: Mapping[str, Any]) -> list[tuple[str, Speed]]:
    """Return a label for every speed that is known: in the runtime, then eager."""
    latency, environment = _mapping(metrics.get("latency")), _mapping(metrics.get("environment"))
    rows = [(f"latency, batch {one.batch}, {_how(latency)}", one) for one in in_runtime(metrics)]
    if rows and latency.get("runtime") == "torch" and latency.get("precision") == "fp32":
        return rows
    device, threads = environment.get("device"), environment.get("threads")
    where = f" on {device}" if device not in (None, "cpu") else f", {show_count(threads, 'thread')}" if threads else ""
    return rows + [(f"latency, batch {one.batch}, {EAGER} fp32{where}", one) for one in in_eager(metrics)]


def _how(latency: Mapping[str, Any]) -> str:
    name = EAGER if latency.get("runtime") == "torch" else latency.get("runtime")
    threads = show_count(int(latency.get("threads", 1)), "thread")
    return f"{name} {latency.get('precision', 'fp32')}{f' on {gpu}' if (gpu := latency.get('gpu')) else f', {threads}'}"


def latency_section(metrics: Mapping[str, Any]) -> Markup:
    """Return both networks' medians and spread by batch, or why there are none."""
    latency = _mapping(metrics.get("latency"))
    if latency.get("reason"):
        return table(("", ""), [("not measured", str(latency["reason"]))], text=(0, 1))
    rows = []
    for batch, sides in sorted(_mapping(latency.get("batches")).items(), key=lambda item: int(item[0])):
        for side in ("teacher", "student"):
            one = _mapping(_mapping(sides).get(side))
            median, error = finite(one.get("median_ms")), finite(one.get("error_ms"))
            rows.append(
                (side, batch, show(median, "{:.3f}"), f"{show(one.get('low_ms'), '{:.3f}')} to "
                 f"{show(one.get('high_ms'), '{:.3f}')}",
                 show(None if error is None or not median else 100 * error / median, "+-{:.2f} %"),
                 show(one.get("rounds"), "{:.0f}"))
            )  # fmt: skip
    headings = ("", "batch", "median, ms", "quartiles, ms", "median known to", "rounds")
    return table(headings, rows, text=(0,)) if rows else Markup()


def int8_section(metrics: Mapping[str, Any]) -> Markup:
    """Return what INT8 makes of both networks: bytes, accuracy, and a call's time by batch."""
    int8 = _mapping(metrics.get("int8"))
    batches = sorted(_mapping(_mapping(int8.get("latency")).get("batches")).items(), key=lambda item: int(item[0]))
    rows = []
    for side in ("teacher", "student"):
        one, whole = _mapping(int8.get(side)), _mapping(metrics.get(side))
        if one.get("status") == "failed":
            rows.append((str(one.get("file")), "", "", "", *("" for _ in batches), str(one.get("reason"))))
        elif one:
            times = (show(_mapping(_mapping(found).get(side)).get("median_ms"), "{:.3f}") for _, found in batches)
            top1 = (show(found.get("top1"), "{:.2f} %") for found in (one, whole))
            rows.append((str(one.get("file")), show(one.get("bytes"), "{:,.0f}"), *top1, *times, _how_made(one)))
    headings = ("", "bytes", "top-1", "in fp32", *(f"ms, batch {size}" for size, _ in batches), "")
    return table(headings, rows, text=(0, len(headings) - 1)) if rows else Markup()


def _how_made(program: Mapping[str, Any]) -> str:
    """Return in words what is special about a program in INT8: its form, and whether blocks were trained for it."""
    training = _mapping(program.get("training"))
    said = [str(program["form"])] if "form" in program else []
    if training.get("validation_top1"):
        top1 = ", ".join(f"{name} {show(one, '{:.2f} %')}" for name, one in training["validation_top1"].items())
        blocks = ", ".join(_mapping(training.get("blocks")))
        said.append(f"{blocks} trained for INT8 (validation images: {top1}); {training.get('kept')} is kept")
    return "; ".join(said)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
