"""The cache of a job with teacher.cache: how large it is, what it costs, where it lies and what is in it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from distill.cache.places import GIB, File, Memory, Place
from distill.cache.rows import Cache as CacheMemory
from distill.cache.rows import Layout, Prices, map_file, measure_prices, sample_of
from distill.config.choices import Amp, Cache, Stop, WireDtype
from distill.config.fingerprint import fingerprint
from distill.config.schema import CacheConfig, JobConfig
from distill.data import Dataset
from distill.distributed.roll_call import RollCall
from distill.engine.streams.cached import Contents, Recorded
from distill.engine.streams.recording import record
from distill.errors import ConfigError
from distill.job.blocks import Blocks
from distill.job.context import Context
from distill.job.reuse import tensors_digest
from distill.planning.costs import Costs, Span
from distill.planning.plan import Plan
from distill.planning.unit import Stretch, boundaries_of
from distill.storage.paths import expanded


def is_cached(config: JobConfig) -> bool:
    """Whether the teacher's activations are recorded before blocks train."""
    return config.teacher.cache is not Cache.off


def students_dtype(config: JobConfig) -> torch.dtype:
    """Return the precision of the activations that students are given; those of a teacher in bf16 have no more."""
    chosen = config.cache.dtype if is_cached(config) else config.plan.wire_dtype
    rounded = chosen is WireDtype.bf16 or config.teacher.amp is Amp.bf16
    return torch.bfloat16 if rounded else torch.float32


@dataclass(frozen=True)
class Host:
    """Ranks that can share memory, in order, and the name of what they share it on."""

    name: str
    ranks: list[int]


class Caching:
    """What a job records and where. Every rank makes one, of the data in its fixed views."""

    def __init__(self, context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks) -> None:
        self._context, self._teacher, self._blocks = context, teacher, blocks
        self._contents = _contents(context.config, dataset)
        self._hosts = _hosts(context.roll_call)
        self._host = next(host for host in self._hosts if context.rank in host.ranks)
        self._seconds = 0.0  # that recording has taken

    def price(self, costs: Costs, spans: Sequence[Span]) -> Costs:
        """Return the costs with what recording, and reading what was recorded, takes on this host."""
        if not spans:
            return costs
        layout = self._layout(spans)
        prices = self._prices(layout)
        costs = replace(costs, read_s_per_byte=prices.read_s)
        if self._place(layout).complete:
            return costs
        dataset = self._contents.dataset
        batch_s = sum(costs.teacher_s[: max(layout.forms)]) + prices.write_s * layout.row_bytes * dataset.batch_size
        # the host with the fewest ranks records longest, and the stage ends with the last
        passes = math.ceil(self._contents.num_batches / min(len(host.ranks) for host in self._hosts))
        slowest = max(costs.slowness_of(rank) for rank in range(self._context.world_size))
        return replace(costs, recording_s=passes * batch_s * slowest)

    def tell(self, plan: Plan, without: Plan) -> None:
        """Tell the user what the plan comes to, and what it would be without a cache."""
        if not plan.spans:
            return
        context, layout, dataset = self._context, self._layout(plan.spans), self._contents.dataset
        context.say(
            f"cache: {layout.nbytes / GIB:.2f} GiB in {context.config.teacher.cache.name} on each host, for "
            f"{len(layout.forms)} boundaries of {dataset.num_train} images in {dataset.num_views} views as "
            f"{context.config.cache.dtype.name}"
        )
        context.say(
            f"cache: recording {plan.recording_s:.1f} s and the stage {plan.predicted_makespan_s:.1f} s are predicted; "
            f"without a cache {without.label} {without.predicted_makespan_s:.1f} s"
        )

    def record(self, plan: Plan) -> Recorded | None:
        """Return the recorded activations, after all of this host's ranks have recorded their shares; None where no
        block is left to train. Every rank calls this."""
        if not plan.spans:
            return None
        layout = self._layout(plan.spans)
        started = time.monotonic()
        with self._context.during("record"):
            recorded = record(
                lambda: self._place(layout),
                layout=layout,
                contents=self._contents,
                chain=self._blocks.chain,
                device=self._context.device,
                control=self._context.control,
                peers=self._host.ranks,
                trace=self._context.trace,
            )
        self._seconds = time.monotonic() - started
        self._context.say(f"cache: recorded in {self._seconds:.1f} s" if plan.recording_s else "cache: found complete")
        return recorded

    def result(self, plan: Plan) -> dict[str, Any]:
        """Return what metrics.json tells of the cache. Rank 0 calls this when the stage is over."""
        if not plan.spans:
            return {}
        control = self._context.control
        shares = [
            control.wait(f"cache/share/{rank}", peer=rank, purpose="share of the cache")
            for rank in range(self._context.world_size)
        ]
        layout = self._layout(plan.spans)
        return {
            "place": self._context.config.teacher.cache.name,
            "dtype": self._context.config.cache.dtype.name,
            "bytes": layout.nbytes,
            "boundaries": len(layout.forms),
            "hosts": len(self._hosts),
            "seconds": self._seconds,
            "predicted_s": plan.recording_s,
            "teacher_passes": sum(share["passes"] for share in shares),
        }

    def remove(self) -> None:
        """Remove what lies in the run directory: every block is trained. Rank 0 calls this."""
        shutil.rmtree(self._context.run.path / "cache", ignore_errors=True)

    def _layout(self, spans: Iterable[Span]) -> Layout:
        """Return what is recorded for these units; in a file, which may serve other attempts, for all."""
        config = self._context.config
        wanted: Iterable[Stretch] = self._blocks.units.values() if config.teacher.cache is Cache.disk else spans
        return _layout(config, self._blocks, wanted, self._contents)

    def _place(self, layout: Layout) -> Place:
        if self._context.config.teacher.cache is Cache.ram:
            return Memory()
        config, run = self._context.config, self._context.run.path
        folder = (expanded(config.cache.dir).absolute() if config.cache.dir else run / "cache") / self._host.name
        key = _digest(self._facts(layout))
        return File(folder, key=key, writer=fingerprint(self._context.identity))

    def _prices(self, layout: Layout) -> Prices:
        sample = sample_of(layout)
        place = Memory()
        place.reserve(sample.nbytes)
        memory = CacheMemory(map_file(place.path, sample.nbytes), sample)
        # the mapping holds the memory for as long as it is needed
        place.discard()
        batch_size = self._contents.dataset.batch_size
        return measure_prices(memory, batch_size=batch_size, device=self._context.device)

    def _facts(self, layout: Layout) -> dict[str, Any]:
        """Return everything that decides what is recorded: a file is used again where all of it is the same."""
        decisive = ("seed", "data.", "teacher.", "distill.views", "blocks.granularity", "blocks.modules")
        return {
            "settings": {path: value for path, value in self._context.identity.items() if path.startswith(decisive)},
            "weights": tensors_digest(self._teacher),
            "layout": asdict(layout),
            "held_out": self._contents.held_out,
            "device": self._context.device.type,
            "torch": torch.__version__,
        }


def tell_unused(context: Context) -> None:
    """Say which settings of the cache were given and change nothing. They are not refused: a sweep over teacher.cache
    gives them to all of its jobs."""
    cache, place = context.config.cache, context.config.teacher.cache
    given = []
    if cache.dir is not None and place is not Cache.disk:
        given.append(f"cache.dir={cache.dir}")
    if cache.max_gib != CacheConfig().max_gib and place is Cache.off:
        given.append(f"cache.max_gib={cache.max_gib:g}")
    for setting in given:
        context.say(f"cache: {setting} changes nothing here: teacher.cache={place.name}")


def refuse_too_large(config: JobConfig, dataset: Dataset, blocks: Blocks) -> None:
    """Raise ConfigError where the teacher's activations for all blocks would take more than cache.max_gib."""
    dataset = dataset.with_views(config.distill.views)
    layout = _layout(config, blocks, blocks.units.values(), _contents(config, dataset))
    if layout.nbytes <= config.cache.max_gib * GIB:
        return
    less = ["larger blocks"]
    less += ["fewer distill.views"] if dataset.num_views > 1 else []
    less += ["cache.dtype=bf16"] if config.cache.dtype is WireDtype.fp32 else []
    raise ConfigError(
        "cache.max_gib",
        config.cache.max_gib,
        f"at least {math.ceil(100 * layout.nbytes / GIB) / 100:.2f}, which {dataset.num_views} x "
        f"{dataset.num_train} images with {len(layout.forms)} boundaries of {layout.row_bytes / 1000:.0f} kB in "
        f"all take; or {', '.join(less)}",
    )


def _contents(config: JobConfig, dataset: Dataset) -> Contents:
    looks = config.distill.check_batches if config.distill.stop is Stop.plateau else 0
    return Contents(dataset, min(looks, dataset.num_validation_batches))


def _layout(config: JobConfig, blocks: Blocks, wanted: Iterable[Stretch], contents: Contents) -> Layout:
    """Return what is recorded for the wanted units."""
    forms = {k: blocks.chain.boundaries[k] for k in sorted(boundaries_of(wanted))}
    return Layout(forms, students_dtype(config), contents.num_rows)


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _hosts(roll_call: RollCall) -> list[Host]:
    """Return which ranks share memory. A host's name is that of its first rank, with a number where several have it."""
    ranks_of: dict[int, list[int]] = {}
    for rank, number in enumerate(roll_call.sharing):
        ranks_of.setdefault(number, []).append(rank)
    names = [roll_call.seats[ranks[0]].host for ranks in ranks_of.values()]
    return [
        Host(name if names.count(name) == 1 else f"{name}-{number}", ranks)
        for (number, ranks), name in zip(ranks_of.items(), names, strict=True)
    ]
