"""`distill latency bundle`: programs of a run's blocks and networks in a folder, to be timed on another device."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from distill.blocks.chain import Chain
from distill.config.compose import compose
from distill.config.outside import make_importable
from distill.config.schema import JobConfig
from distill.deployment.bundle import Group, write_bundle
from distill.deployment.chains import LatencyTable, Place
from distill.deployment.forms import BRANCHES
from distill.deployment.runtimes import ReadsOnnx
from distill.errors import ConfigError, DistillError, one_of
from distill.job.blocks import Blocks, cut_blocks
from distill.job.data import open_data
from distill.job.latency import BATCHES, FILES, runtime_of_job
from distill.job.pool import find_pool
from distill.job.teacher import build_teacher
from distill.observability.numbers import show_count
from distill.storage.files import read_bytes
from distill.storage.paths import expanded

USAGE = "python -m distill latency bundle run=DIR [out=FOLDER] [deploy.runtime=...] [deploy.batch=...]"
OUT = "out="
CPU = torch.device("cpu")


def main(arguments: Sequence[str]) -> int:
    """Run `distill latency`; return the exit status: 0, or 2 after an error that has been told in one line."""
    try:
        if [*arguments[:1]] != ["bundle"]:
            given = arguments[0] if arguments else ""
            raise DistillError(f"got {given!r}; expected {one_of(['bundle'], given)}: {USAGE}")
        folder = _write(arguments[1:])
    except DistillError as error:
        sys.stderr.write(f"distill latency: {error}\n")
        return 2
    sys.stdout.write(
        f"{folder}: copy it to the device and run measure.py there; then deploy.table=table.json, which it writes, "
        "takes the place of measuring here\n"
    )
    return 0


def _write(words: Sequence[str]) -> Path:
    outs = [word.removeprefix(OUT) for word in words if word.startswith(OUT)]
    overrides = [word for word in words if not word.startswith(OUT)]
    runs = [word.removeprefix("run=") for word in overrides if word.startswith("run=")]
    if not runs:
        raise ConfigError("run", None, f"the directory of a run: {USAGE}")
    config = compose(overrides)
    if config.deploy.table is not None:
        raise ConfigError("deploy.table", config.deploy.table, "null: a bundle is what a table is measured with")
    run = expanded(runs[-1])
    folder = expanded(outs[-1]) if outs else run / "bundle"
    if folder.exists() and any(folder.iterdir()) and not (folder / "bundle.json").exists():
        raise ConfigError("out", str(folder), "an empty or new folder, or that of an earlier bundle")
    groups = [*_groups(config, run)]
    number = write_bundle(folder, groups, runtime_of_job(config))
    sys.stdout.write(f"{show_count(number, 'program')} in {show_count(len(groups), 'group')}\n")
    return folder


def _groups(config: JobConfig, run: Path) -> Iterator[Group]:
    """Yield the run's whole networks at every batch size, and its candidates beside the teacher's own blocks."""
    runtime, deploy = runtime_of_job(config), config.deploy
    if not isinstance(runtime, ReadsOnnx):
        raise ConfigError("deploy.runtime", runtime.name, "onnxruntime or openvino: a bundle holds ONNX programs")
    make_importable(config.run.code)
    with open_data(config, CPU, ranks_here=1) as dataset:
        teacher = build_teacher(config, dataset, CPU)
        chain, candidates = _candidates(config, dataset.image_shape, teacher)
    table = LatencyTable(chain, teacher, runtime, batch=deploy.batch)
    yield Group(deploy.batch, [(piece.what, piece.source) for piece in table.calibration()])
    files = [(name, run / name) for name in FILES.values() if (run / name).exists()]
    pieces = [(name, runtime.source_of(read_bytes(path))) for name, path in files]
    for batch in sorted({*BATCHES, deploy.batch}) if len(pieces) == len(FILES) else []:
        yield Group(batch, pieces)
    for place, modules in candidates.items():
        base, chains = table.chains(place, modules)
        pieces = [("the teacher's", base)]
        for name, forms in chains.items():
            pieces += zip((name, f"{name}, as a {BRANCHES}"), forms, strict=False)  # as forms_of() has them
        yield Group(deploy.batch, pieces)


def _candidates(
    config: JobConfig, image_shape: tuple[int, ...], teacher: nn.Module
) -> tuple[Chain, Mapping[Place, Mapping[str, nn.Module]]]:
    """Return the cut teacher and, by place and named, what its blocks become: all that they may, under budgets."""
    if not config.search.on:
        blocks = cut_blocks(config, image_shape, teacher, CPU)
        return blocks.chain, {place: {name: one} for place, (name, one) in candidates_of(blocks).items()}
    pool = find_pool(config, image_shape, teacher, CPU)
    found: dict[Place, dict[str, nn.Module]] = {}
    for number, swap in enumerate(pool.swaps):
        name = f"{swap.label} in {pool.place_name(number)}"
        found.setdefault((swap.first, swap.end), {})[name] = pool.row(number, swap.students(pool.chain))
    return pool.chain, found


def candidates_of(blocks: Blocks) -> Mapping[Place, tuple[str, nn.Module]]:
    """Return a run's candidates by their place, named. Those that read what others have made narrower are one with
    them: a stage's stream fits only as a whole."""
    joined: list[list[int]] = []
    for number in sorted(blocks.candidates, key=lambda number: blocks.candidates[number].input):
        one = blocks.candidates[number]
        reads, _ = one.recipe.ends(one.changes)
        if reads is not None and joined and blocks.candidates[joined[-1][-1]].target == one.input:
            joined[-1].append(number)
        else:
            joined.append([number])
    found: dict[Place, tuple[str, nn.Module]] = {}
    for numbers in joined:
        first, last = (blocks.candidates[number] for number in (numbers[0], numbers[-1]))
        name = f"{first.name} in {blocks.chain.blocks[first.input].name}"
        found[first.input, last.target] = (name, nn.Sequential(*map(blocks.build, numbers)))
    return found
