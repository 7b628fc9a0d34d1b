"""Which channels of the teacher's streams stay: chosen once, before anything is planned, and the same on every rank."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from distill.blocks.chain import copied
from distill.data import Dataset
from distill.job.blocks import Blocks
from distill.job.candidates import Candidate
from distill.job.context import Context
from distill.job.first_weights import gathered
from distill.job.reuse import TEACHER
from distill.observability.numbers import show_count
from distill.profiling.statistics import InputStatistics, bytes_for
from distill.recipes import Stream
from distill.recipes.stream import choose_units, with_units

STAGE = "streams"
AT_MOST = 2**31  # bytes of covariances at a time; streams whose readers' have no room are chosen by norm


def with_chosen_streams(context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks) -> Blocks:
    """Return the blocks with the channels that stay between them. Every rank must call; rank 0 chooses."""
    streams = {number: one for number, one in blocks.candidates.items() if isinstance(one.recipe, Stream)}
    if not streams:
        return blocks

    def work() -> dict[str, Any]:
        start = time.monotonic()
        wanted = dict.fromkeys(path for one in streams.values() for path in one.recipe.wants(one.changes))
        statistics = gathered(context, dataset, teacher, with_space(teacher, list(wanted)))
        units = chosen_units(teacher, streams.values(), statistics)
        seconds = time.monotonic() - start
        count, readers = show_count(len(units), "stream"), show_count(len(wanted), "layer")
        context.say(f"channels of {count} chosen by the inputs of {len(statistics)} of {readers} in {seconds:.1f} s")
        return {"units": units, "seconds": seconds}

    with context.during(STAGE):
        found = context.lead(STAGE, work, used=[TEACHER])["units"]
    units = {int(number): kept for number, kept in found.items()}
    chosen = {number: replace(one, changes=with_units(one.changes, units)) for number, one in streams.items()}
    return replace(blocks, candidates=blocks.candidates | chosen)


def chosen_units(
    teacher: nn.Module, candidates: Iterable[Candidate], statistics: Mapping[str, InputStatistics]
) -> dict[int, list[int]]:
    """Return the units that stay of every stream, by its number, that these candidates make narrower together."""
    changes = [one.changes for one in candidates if isinstance(one.recipe, Stream)]
    return choose_units(copied(teacher).eval(), changes, statistics) if changes else {}


def with_space(teacher: nn.Module, paths: list[str]) -> list[str]:
    """Return the first of these layers, as many as have room for their covariances."""
    used, found = 0, []
    for path in paths:
        used += bytes_for(teacher.get_submodule(path).weight[0].numel())  # type: ignore[index]
        if used <= AT_MOST:
            found.append(path)
    return found
