"""Starts real ranks on gloo and runs toy distill stages on them, with injected faults."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from distill.blocks.bf16 import Bf16Chain
from distill.blocks.chain import Chain
from distill.blocks.cut import Granularity, cut
from distill.cache.places import File
from distill.cache.places import Memory as CacheMemory
from distill.cache.rows import Layout
from distill.data import Augment, Dataset
from distill.distributed.store import Control, StoreAddress
from distill.engine.rebalance.moves import Move
from distill.engine.session import Session, SessionReport
from distill.engine.streams.cached import Contents, Recorded
from distill.engine.streams.recording import record
from distill.observability.trace import Trace
from distill.planning.costs import Span
from distill.planning.memory_model import Memory
from distill.planning.plan import Plan
from distill.planning.schedule import Checks
from distill.planning.unit import Unit
from distill.recipes import Separable, replace_convolutions
from distill.storage.checkpoint import CheckpointFolder, unit_name
from distill.storage.ledger import Entry, Ledger
from distill.training.optim import TrainerOptions
from distill.training.trainer import BlockTrainer, Reading
from tests.opened import opened

TIMEOUT_S = 30.0
HOLD_S = 60.0
CHANNELS = (3, 8, 8, 12, 8)  # four convolution blocks, each with a batch norm and a ReLU


def run_ranks(
    function: Callable[..., None], world_size: int, *arguments: Any, join: bool = True, start_method: str = "forkserver"
) -> mp.ProcessContext | None:
    """Call function(rank, world_size, environment, *arguments) in fresh processes that share a store.

    With join=False the processes are returned running. A rank's exception is raised here with its traceback.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "test",
    }
    # One server process imports everything once; every rank is a fork of it, in a fraction of a second.
    multiprocessing.set_forkserver_preload(["distill.engine.session", "tests.dist.ranks"])
    context = mp.start_processes(
        _rank_main,
        args=(function, world_size, environment, arguments),
        nprocs=world_size,
        join=False,
        start_method=start_method,
    )
    context.test_store = store  # keeps the server alive as long as the ranks
    if not join:
        return context
    while not context.join():
        pass
    return None


def _rank_main(
    rank: int,
    function: Callable[..., None],
    world_size: int,
    environment: Mapping[str, str],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    function(rank, world_size, environment, *arguments)


def connect(rank: int, world_size: int, environment: Mapping[str, str], *, generation: int = 1) -> Control:
    """Return this rank's control plane."""
    address = StoreAddress(rank=rank, world_size=world_size, environment=environment, timeout_s=TIMEOUT_S)
    control = Control(address, rank=rank, world_size=world_size, timeout_s=TIMEOUT_S)
    control.generation = generation
    return control


def meet(control: Control) -> None:
    """Wait until the other of two ranks has come as far; over a connection of its own, which no thread needs
    meanwhile."""
    store = control.address.connect()
    store.set(f"met/{control.rank}", "yes")
    store.wait([f"met/{1 - control.rank}"])


@contextmanager
def two_controls(timeout_s: float = 20.0) -> Iterator[tuple[Control, Control]]:
    """The control planes of two ranks over one store in this process, for as long as they are looked at."""
    address = StoreAddress(rank=0, world_size=1, environment={}, timeout_s=timeout_s)
    here, there = (Control(address, rank=rank, world_size=2, timeout_s=timeout_s) for rank in range(2))
    try:
        yield here, there
    finally:
        stop_heart(here)
        stop_heart(there)


def stop_heart(control: Control) -> None:
    """Let a rank fall silent."""
    control._stop.set()


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A toy distill stage: four small blocks of a random teacher on 8-pixel digits.

    Units are the blocks, and whatever else is among `units`: candidates of one block have one more depthwise filter for
    every number above the blocks', and one that spans blocks is a row of two convolutions. `owners[rank]` are the
    numbers of the rank's units. `slow` adds seconds to every update of a block. `hold_at` (block, step)
    makes that block stand still there until all others are in the ledger, and fail if they wait for it. `fail_at`
    (rank, step) makes that rank raise before its first update at the step, `kill_at` makes it vanish there as by
    kill -9. `nan_at` (block, step) poisons that block's input, on `nan_ranks` or all. With the strategy `cached`
    the teacher's activations are recorded first, in memory or in `cache_dir`; with `record_fails` (rank, passes) up
    to an error after so many of that rank's passes, and by a `slow_recorder` half a second late.
    """

    run_dir: str
    owners: tuple[tuple[int, ...], ...]
    budgets: Mapping[int, int] = field(default_factory=lambda: dict.fromkeys(range(4), 6))
    units: tuple[Unit, ...] = ()
    strategy: str = "broadcast"
    teacher_ranks: int = 1
    groups: tuple[tuple[int, ...], ...] = ()
    window: int = 2
    wire_dtype: torch.dtype = torch.float32
    teacher_amp: str = "off"
    shared_memory: bool = True
    take_over: bool = True
    memory: Memory | None = None
    optimizer: str = "adam"
    checks: Checks = field(default_factory=Checks)
    patience: int = 0
    checkpoint_every: int = 1000
    generation: int = 1
    slow: Mapping[int, float] = field(default_factory=dict)
    hold_at: tuple[int, int] | None = None
    fail_at: tuple[int, int] | None = None
    kill_at: tuple[int, int] | None = None
    nan_at: tuple[int, int] | None = None
    nan_ranks: tuple[int, ...] | None = None
    views: int | None = None
    cache_dir: str | None = None
    record_fails: tuple[int, int] | None = None
    slow_recorder: int | None = None

    def unit(self, number: int) -> Unit:
        return next((one for one in self.units if one.number == number), Unit.of_block(number, f"block{number}"))


class InjectedError(RuntimeError):
    """The fault that a test asked for."""


def run_toy(toy: Toy) -> dict[int, Entry]:
    """Run a toy stage on len(toy.owners) ranks and return the ledger."""
    run_ranks(toy_rank, len(toy.owners), toy)
    return Ledger(Path(toy.run_dir)).entries


def toy_rank(rank: int, world_size: int, environment: Mapping[str, str], toy: Toy) -> None:
    """One rank of a toy stage; rank 0 writes report.json, every rank the blocks of its readings and what its parameters
    have become."""
    control = connect(rank, world_size, environment, generation=toy.generation)
    run_dir = Path(toy.run_dir)
    with opened(image_size=8, augment=Augment.crop, batch_size=16) as fresh:
        dataset = fresh.with_views(toy.views)
        chain = toy_chain(dataset.train_batch(0).images)
        if toy.teacher_amp == "bf16":
            chain = Bf16Chain(chain)
        checkpoints = CheckpointFolder(run_dir, generation=toy.generation)

        def make(block: int) -> FaultyTrainer:
            return _trainer(toy, chain, checkpoints, toy.unit(block), rank)

        plan = _plan(toy, chain, checkpoints, Ledger(run_dir) if rank == 0 else None, control)
        trainers = [make(span.unit) for span in plan.trained_by(rank)]
        readings: list[Reading] = []
        trace = Trace(rank, toy.generation)
        session = Session(
            control=control,
            chain=chain,
            dataset=dataset,
            plan=plan,
            budget=max(toy.budgets.values()),
            checks=toy.checks,
            wire_dtype=toy.wire_dtype,
            wire_backend="gloo",
            shared_memory=toy.shared_memory,
            take_over=toy.take_over,
            device=torch.device("cpu"),
            window=toy.window,
            timeout_s=TIMEOUT_S,
            checkpoints=checkpoints,
            checkpoint_every=toy.checkpoint_every,
            report=readings.append,
            make=make,
            trace=trace,
            memory=toy.memory,
            recorded=_recorded(toy, plan, chain, dataset, control, trace) if toy.strategy == "cached" else None,
        )
        if rank == 0:
            recorded: list[int] = []
            moves: list[Move] = []
            report = session.lead(
                trainers,
                Ledger(run_dir),
                on_recorded=lambda entry: recorded.append(entry.unit),
                on_moved=moves.append,
            )
            _write_report(run_dir, report, recorded, moves)
        else:
            session.follow(trainers)
        (run_dir / f"readings{rank}.json").write_text(json.dumps([reading.unit for reading in readings]))
        parameters = {trainer.unit.number: trainer.last for trainer in trainers}
        (run_dir / f"parameters{rank}.json").write_text(json.dumps(parameters))
    control.leave()


def digest(tensors: Iterable[Tensor]) -> str:
    """Return a checksum of the tensors' values."""
    return hashlib.sha256(b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


def toy_chain(sample: Tensor) -> Chain:
    """Return the toy teacher, cut into one block a convolution; its weights are a function of a fixed seed."""
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for channels, out in pairwise(CHANNELS):
        layers += [nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
    network = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    return cut(network, sample, granularity=Granularity.conv)


def _plan(toy: Toy, chain: Chain, checkpoints: CheckpointFolder, ledger: Ledger | None, control: Control) -> Plan:
    if ledger is not None:
        spans = []
        for block, budget in toy.budgets.items():
            checkpoint = checkpoints.load(unit_name(block))
            if block not in ledger.entries:
                spans.append(Span.of(toy.unit(block), checkpoint.step if checkpoint else 0, budget))
        ranks = len(toy.owners)
        groups = (tuple(range(ranks)),) if toy.strategy == "ddp" else toy.groups
        plan = Plan(
            toy.strategy, toy.owners, tuple(spans), 1.0, (1.0,) * ranks, _starts(toy),
            teacher_ranks=toy.teacher_ranks, groups=groups,
        )  # fmt: skip
        control.set("plan", plan.to_json())
    return Plan.from_json(control.wait("plan", peer=0, purpose="plan"))


def _recorded(toy: Toy, plan: Plan, chain: Chain, dataset: Dataset, control: Control, trace: Trace) -> Recorded:
    """The toy's cache on this rank; how many passes each rank has made is left in passes.RANK.GENERATION."""
    contents = Contents(dataset, toy.checks.batches)
    forms = {boundary: chain.boundaries[boundary] for boundary in range(5)}
    recorded = record(
        lambda: File(Path(toy.cache_dir), key="toy", writer="test") if toy.cache_dir else CacheMemory(),
        layout=Layout(forms, toy.wire_dtype, contents.num_rows),
        contents=contents,
        chain=_Recorder(chain, toy, control.rank),
        device=torch.device("cpu"),
        control=control,
        peers=list(range(plan.world_size)),
        trace=trace,
    )
    passes = control.get(f"cache/share/{control.rank}")["passes"]
    (Path(toy.run_dir) / f"passes.{control.rank}.{toy.generation}").write_text(str(passes))
    return recorded


class _Recorder:
    """The chain to record with, which is late or fails where the toy says so."""

    def __init__(self, chain: Chain, toy: Toy, rank: int) -> None:
        self._chain = chain
        self._left = toy.record_fails[1] if toy.record_fails and toy.record_fails[0] == rank else -1
        self._delay_s = 0.5 if toy.slow_recorder == rank else 0.0

    def run(self, *arguments: Any, **options: Any) -> dict[int, Tensor]:
        if self._left == 0:
            raise InjectedError("injected while recording")
        self._left -= 1
        time.sleep(self._delay_s)
        self._delay_s = 0.0
        return self._chain.run(*arguments, **options)


def _starts(toy: Toy) -> tuple[int, ...]:
    """Where each rank's stretch of a relay begins: with the first of its blocks, but for the first rank's."""
    if toy.strategy != "relay":
        return ()
    first = next(rank for rank, owned in enumerate(toy.owners) if owned)
    starts = [
        0 if rank == first or not owned else min(toy.unit(number).input for number in owned)
        for rank, owned in enumerate(toy.owners)
    ]
    for group in toy.groups:
        for rank in group:
            starts[rank] = starts[group[0]]
    return tuple(starts)


def _student(chain: Chain, unit: Unit) -> nn.Module:
    generator = torch.Generator().manual_seed(unit.number)
    if unit.target > unit.input + 1:
        module: nn.Module = nn.Sequential(
            nn.Conv2d(CHANNELS[unit.input], 4, 1), nn.ReLU(), nn.Conv2d(4, CHANNELS[unit.target], 1)
        )
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)
    else:
        module, more = chain.block_module(unit.input), max(0, unit.number - len(chain.blocks) + 1)
        recipe = Separable(rank=2 + more, init="random")
        replace_convolutions(module, chain.blocks[unit.input].convolutions, recipe, generator)
    return module.to(memory_format=torch.channels_last)


def _trainer(toy: Toy, chain: Chain, checkpoints: CheckpointFolder, unit: Unit, rank: int) -> FaultyTrainer:
    options = TrainerOptions(optimizer=toy.optimizer, log_every=3, patience=toy.patience, lr=0.01)
    trainer = FaultyTrainer(
        unit,
        _student(chain, unit),
        budget=toy.budgets[unit.number],
        device=torch.device("cpu"),
        options=options,
    )
    trainer.toy, trainer.rank = toy, rank
    checkpoint = checkpoints.load(unit_name(unit.number))
    if checkpoint is not None:
        trainer.resume(checkpoint)
    return trainer


class FaultyTrainer(BlockTrainer):
    """A trainer that is slow, stands still, raises, vanishes or sees NaN where the toy says so."""

    toy: Toy
    rank: int
    last = ""  # checksum of the parameters before they are freed

    def free(self) -> None:
        self.last = digest(self.module.parameters())
        super().free()

    def update(self, inputs: Tensor, targets: Tensor) -> Reading | None:
        if self.toy.fail_at == (self.rank, self.step):
            raise InjectedError(f"injected on rank {self.rank} at step {self.step}")
        if self.toy.kill_at == (self.rank, self.step):
            os._exit(9)
        here = self.toy.nan_ranks is None or self.rank in self.toy.nan_ranks
        if here and self.toy.nan_at == (self.unit.number, self.step):
            inputs = inputs * float("nan")
        if self.toy.hold_at == (self.unit.number, self.step):
            self._hold()
        with self._watch.running():
            time.sleep(self.toy.slow.get(self.unit.number, 0.0))
        return super().update(inputs, targets)

    def _hold(self) -> None:
        recorded, others = Path(self.toy.run_dir) / "blocks", self.toy.budgets.keys() - {self.unit.number}
        deadline = time.monotonic() + HOLD_S
        while not all((recorded / f"{unit_name(block)}.safetensors").exists() for block in others):
            assert time.monotonic() < deadline, f"the others wait for block {self.unit.number}"
            time.sleep(0.02)


def _write_report(run_dir: Path, report: SessionReport, recorded: list[int], moves: list[Move]) -> None:
    facts = {
        "makespan_s": report.makespan_s,
        "teacher_passes": sum(rank.teacher_passes for rank in report.ranks.values()),
        "bytes_sent": sum(rank.bytes_sent for rank in report.ranks.values()),
        "take_overs": report.take_overs,
        "ranks": {rank: asdict(spent) for rank, spent in report.ranks.items()},
        "recorded": recorded,
        "moves": [asdict(move) for move in moves],
    }
    (run_dir / "report.json").write_text(json.dumps(facts))
