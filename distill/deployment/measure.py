"""Times ONNX programs side by side on the machine that it runs on. Needs Python 3.10, numpy and onnxruntime (or
openvino), and nothing else: it is copied into bundles for other devices, and knows nothing of the package.

    python measure.py                             time every piece of the bundle that it lies in; write table.json
    python measure.py teacher.onnx student.onnx   time these files
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Call = Callable[[int], float]  # runs a program so many times in a row and returns the seconds that this took
Clock = Callable[[], float]

FORMAT = 1  # of tables and bundles; another method of timing is another format
ERROR = 0.005  # standard error of every median, as a share of it, at which measuring ends,
LIMIT_S = 3.0  # or after so many seconds for each program
MIN_ROUNDS = 9  # as long as the limit allows: fewer say nothing of their spread
TURN_S = 0.005  # a program's turn lasts about so long: shorter calls are made several times
RUNTIMES = ("onnxruntime", "openvino")
PRECISIONS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}  # what OpenVINO calls them; INT8 is in the file itself
CPU_FACTS, BOARD = Path("/proc/cpuinfo"), Path("/proc/device-tree/model")


class MeasureError(Exception):
    """What cannot be measured here, in words for the user."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call, or by how much two calls differ: the median of all rounds, their quartiles, and the
    standard error of the median."""

    median_ms: float
    low_ms: float
    high_ms: float
    error_ms: float
    rounds: int

    @property
    def error(self) -> float:
        """The standard error as a share of the median."""
        return self.error_ms / abs(self.median_ms) if self.median_ms else math.inf


def summary(seconds: Sequence[float]) -> Timing:
    """Return the timing of rounds. The error is 0.93 IQR / sqrt(n) (McGill, Tukey, Larsen 1978, "Variations of box
    plots"), of a single round all of it."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [*seconds] * 3
    error = 0.93 * (high - low) / math.sqrt(len(seconds)) if len(seconds) > 1 else abs(median)
    return Timing(1000 * median, 1000 * low, 1000 * high, 1000 * error, len(seconds))


def beside(seconds: Sequence[float], base: Sequence[float], base_ms: float) -> tuple[Timing, Timing]:
    """Return the timing of a program, and of by how much it takes longer than another one that ran in the same rounds
    and is known to take `base_ms`: what slows the machine down for a while, or for this hour, slows both down."""
    scaled = [own / other * base_ms / 1000 for own, other in zip(seconds, base, strict=True)]
    return summary(scaled), summary([own - base_ms / 1000 for own in scaled])


def piece_key(key: str, batch: int) -> str:
    """Return what the timing of a program on batches of that size is kept under."""
    return f"{key}-b{batch}"


def difference_key(key: str, base: str) -> str:
    """Return what the difference of a piece to another is kept under."""
    return f"{key}/{base}"


def in_turn(
    programs: Sequence[Call],
    *,
    error: float = ERROR,
    limit_s: float = LIMIT_S,
    clock: Clock = time.perf_counter,
) -> list[list[float]]:
    """Return by program the seconds of one call in every round; a round is a turn of each, in a new order.

    Ends when every median is known to `error`, or after `limit_s` seconds for each program: summary() tells which.
    """
    repeats = []
    for program in programs:
        program(1)  # allocates, compiles, reads weights
        repeats.append(max(1, math.ceil(TURN_S / max(program(1), 1e-7))))
    order, shuffled = list(range(len(programs))), random.Random(0)
    rounds: list[list[float]] = [[] for _ in programs]
    started = clock()
    while True:
        shuffled.shuffle(order)
        for index in order:
            if repeats[index] > 1:
                programs[index](1)  # finds the caches as another program has left them, as no call in use does
            rounds[index].append(programs[index](repeats[index]) / repeats[index])
        if clock() - started > limit_s * len(programs):
            return rounds
        if len(rounds[0]) >= MIN_ROUNDS and all(summary(seconds).error <= error for seconds in rounds):
            return rounds


def cpu_model() -> str:
    """Return the name of the processor, or of the board that it is on."""
    lines = CPU_FACTS.read_text(errors="replace").splitlines() if CPU_FACTS.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    board = BOARD.read_text(errors="replace").strip("\0\n ") if BOARD.exists() else ""
    return next(iter(names), "") or board or platform.processor() or platform.machine()


def environment(runtime: str, *, threads: int, precision: str) -> dict[str, Any]:
    """Return what a timing holds for, besides the program and the batch."""
    try:
        found = version(runtime)
    except PackageNotFoundError:
        found = str(getattr(import_module(runtime), "__version__", "unknown"))
    how = {"threads": threads, "precision": precision, "clock": clock_of(threads)[0]}
    return {"runtime": runtime, "version": found, **how, "cpu": cpu_model()}


def clock_of(threads: int) -> tuple[str, Clock]:
    """Return the name of a clock, and the clock. One thread is timed by the seconds that the processor gives to this
    process, which are those on the wall where nothing else runs, and 30 times steadier where something does."""
    return ("processor", time.process_time) if threads == 1 else ("wall", time.perf_counter)


def opened(content: bytes, *, batch: int, runtime: str, threads: int, precision: str) -> Call:
    """Return an ONNX program of one input as a call on a fixed batch of random images, on the CPU."""
    try:
        module = import_module(runtime)
    except ImportError as error:
        raise MeasureError(f"{runtime} cannot be imported here ({error}): pip install {runtime}") from error
    start = _onnxruntime if runtime == "onnxruntime" else _openvino
    try:
        return timed(start(module, content, batch, threads, precision), threads)
    except MeasureError:
        raise
    except Exception as error:  # each runtime has its own
        first = str(error).strip().partition("\n")[0]
        raise MeasureError(f"it cannot be read as an ONNX program, or not run: {first}") from error


def timed(run: Callable[[], object], threads: int) -> Call:
    """Return what calls a program that computes in so many threads, and times it."""
    _, clock = clock_of(threads)

    def call(times: int) -> float:
        begin = clock()
        for _ in range(times):
            run()
        return clock() - begin

    return call


def _onnxruntime(module: Any, content: bytes, batch: int, threads: int, precision: str) -> Callable[[], object]:
    if precision == "bf16":
        raise MeasureError("onnxruntime computes in fp32 or int8 on CPUs, not in bf16")
    options = module.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = module.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (given,), binding = session.get_inputs(), session.io_binding()
    images = _images(given.name, given.shape, batch)
    binding.bind_cpu_input(given.name, images)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    session.run_with_iobinding(binding)  # from here on outputs have their place, as in a program that keeps it
    for output, value in zip(session.get_outputs(), binding.get_outputs(), strict=True):
        binding.bind_ortvalue_output(output.name, value)
    return lambda: session.run_with_iobinding(binding)


def _openvino(module: Any, content: bytes, batch: int, threads: int, precision: str) -> Callable[[], object]:
    core = module.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise MeasureError("this processor has no bf16: OpenVINO would compute in fp32")
    model = core.read_model(model=content)
    shape = [dimension.get_length() if dimension.is_static else None for dimension in model.input(0).partial_shape]
    images = _images("the input", shape, batch)
    model.reshape(list(images.shape))
    hints = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": threads}
    compiled = core.compile_model(model, "CPU", {**hints, "INFERENCE_PRECISION_HINT": PRECISIONS[precision]})
    request = compiled.create_infer_request()
    request.set_input_tensor(module.Tensor(images, shared_memory=True))
    return request.infer  # type: ignore[no-any-return]


def _images(name: str, shape: Sequence[Any], batch: int) -> Any:
    import numpy as np

    if not all(isinstance(side, int) for side in shape[1:]):
        raise MeasureError(f"{name} has the shape {list(shape)}: only the batch may be left open")
    return np.random.default_rng(0).standard_normal((batch, *shape[1:]), dtype=np.float32)


def measure_bundle(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the table of a bundle: the timing of every piece by its key, and of its difference to the first of its
    group. A key ends with the batch."""
    bundle = json.loads((folder / "bundle.json").read_text())
    if bundle["format"] != FORMAT:
        raise MeasureError(f"bundle.json has format {bundle['format']}, this script reads {FORMAT}: make both anew")
    how = {name: getattr(options, name) or bundle[name] for name in ("runtime", "threads")}
    how["precision"] = bundle["precision"]
    timings: dict[str, Any] = {}
    for number, group in enumerate(bundle["groups"], start=1):
        names = [piece["name"] for piece in group["pieces"]]
        calls = [opened((folder / p["file"]).read_bytes(), batch=group["batch"], **how) for p in group["pieces"]]
        rounds = in_turn(calls, limit_s=options.seconds)
        keys = [piece_key(piece["key"], group["batch"]) for piece in group["pieces"]]
        base = timings.setdefault(keys[0], asdict(summary(rounds[0])))
        for key, own in zip(keys[1:], rounds[1:], strict=True):
            alone, difference = map(asdict, beside(own, rounds[0], base["median_ms"]))
            timings.setdefault(key, alone)
            timings[difference_key(key, keys[0])] = difference
        sys.stdout.write(f"group {number} of {len(bundle['groups'])}, batch {group['batch']}\n")
        sys.stdout.write(lines(names, [summary(own) for own in rounds]))
        sys.stdout.flush()
    return {"format": FORMAT, "environment": environment(**how), "timings": timings}


def measure_files(files: Sequence[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Return how fast some files are, batch by batch, and print it."""
    how = {"runtime": options.runtime or RUNTIMES[0], "threads": options.threads or 1, "precision": options.precision}
    batches = {}
    for batch in options.batch:
        found = [summary(own) for own in compared([file.read_bytes() for file in files], batch, options.seconds, **how)]
        sys.stdout.write(f"batch {batch}\n" + lines([file.name for file in files], found))
        sys.stdout.flush()
        batches[str(batch)] = {str(file): asdict(one) for file, one in zip(files, found, strict=True)}
    return {"format": FORMAT, "environment": environment(**how), "batches": batches}


def compared(contents: Sequence[bytes], batch: int, limit_s: float, **how: Any) -> list[list[float]]:
    """Return in_turn() of some ONNX programs on a batch of that size."""
    return in_turn([opened(content, batch=batch, **how) for content in contents], limit_s=limit_s)


def lines(names: Sequence[str], timings: Sequence[Timing]) -> str:
    """Return a line for each: its median, its quartiles, and how it compares with the first."""
    text = ""
    for name, one in zip(names, timings, strict=True):
        ratio = f"  {timings[0].median_ms / one.median_ms:6.2f}x as fast as {names[0]}" if one is not timings[0] else ""
        doubt = "" if one.error <= ERROR else f"  (known to {100 * one.error:.1f} % only, when time was up)"
        spread = f"{one.low_ms:.3f} to {one.high_ms:.3f}"
        text += f"  {name:<32} {one.median_ms:10.3f} ms  {spread:>22}  {one.rounds:4d} rounds{ratio}{doubt}\n"
    return text


def parser_of(prog: str) -> argparse.ArgumentParser:
    """Return the options, which `distill bench` has too."""
    parser = argparse.ArgumentParser(prog=prog, description="Time ONNX programs side by side on this machine's CPU.")
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="ONNX files; without any: the bundle beside the script"
    )
    parser.add_argument("--runtime", choices=RUNTIMES, help="default: the bundle's, else onnxruntime")
    parser.add_argument("--threads", type=int, help="default: the bundle's, else 1")
    parser.add_argument(
        "--precision", choices=sorted(PRECISIONS), default="fp32", help="of files (a bundle has its own)"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="of files (default: 1 64)")
    parser.add_argument("--seconds", type=float, default=LIMIT_S, help=f"most for each program (default: {LIMIT_S:g})")
    parser.add_argument("-o", "--output", type=Path, help="the table to write (default: table.json for a bundle)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; return the exit status: 0, or 2 after an error that has been told in one line."""
    options = parser_of("measure.py").parse_args(arguments)
    here = Path(__file__).resolve().parent
    try:
        if options.files:
            table = measure_files([Path(file) for file in options.files], options)
        else:
            table, options.output = measure_bundle(here, options), options.output or here / "table.json"
        if options.output:
            options.output.write_text(json.dumps(table, indent=1) + "\n")
            sys.stdout.write(f"{options.output}\n")
    except (MeasureError, OSError) as error:
        sys.stderr.write(f"measure.py: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
