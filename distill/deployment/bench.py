"""`distill bench`: times whole ONNX files, or those of a run, side by side on this machine, as measure.py does."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from distill.deployment.measure import MeasureError, measure_files, parser_of
from distill.errors import DistillError
from distill.storage.paths import expanded

RUN = "run="
OF_A_RUN = ("teacher.onnx", "student.onnx", "teacher_int8.onnx", "student_int8.onnx")


def main(arguments: Sequence[str]) -> int:
    """Run `distill bench`; return the exit status: 0, or 2 after an error that has been told in one line."""
    parser = parser_of("distill bench")
    parser.epilog = "run=DIR in the place of files: the programs of that run, those in INT8 too"
    options = parser.parse_args(arguments)
    try:
        files = [file for word in options.files for file in _files(word)]
        if not files:
            raise DistillError("no files; expected run=DIR or ONNX files, such as teacher.onnx student.onnx")
        table = measure_files(files, options)
        if options.output:
            options.output.write_text(json.dumps(table, indent=1) + "\n")
    except (DistillError, MeasureError, OSError) as error:
        sys.stderr.write(f"distill bench: {error}\n")
        return 2
    return 0


def _files(word: str) -> list[Path]:
    """Return the file that a word names, or the programs of the run that it names."""
    if not word.startswith(RUN):
        path = expanded(word)
        if not path.is_file():
            raise DistillError(f"{word}: no such file; expected an ONNX file, or run=DIR")
        return [path]
    folder = expanded(word.removeprefix(RUN))
    files = [folder / name for name in OF_A_RUN if (folder / name).is_file()]
    if not files:
        again = f"a run writes them where the extra onnx is installed; python -m distill stage=deliver run={folder}"
        raise DistillError(f"{word}: neither {OF_A_RUN[0]} nor {OF_A_RUN[1]} is there; {again}")
    return files
