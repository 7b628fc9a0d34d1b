"""The distill stage: costs, plan, streams, training, collection; then the assembled student."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from distill.assemble import assemble, recalibrate
from distill.checkpoint import CheckpointFolder, block_name, contiguous
from distill.completion import Collector, Deliverer
from distill.config import Cost, JobConfig, Stage, Stop, WireDtype
from distill.control import ranks_of
from distill.cost import WIRE_S_PER_BYTE, BlockCosts, average, calibrated, flop_costs, measured_costs
from distill.data import Dataset
from distill.data.addressing import derive_seed
from distill.engine import distill
from distill.files import write_bytes, write_json, write_text
from distill.job.context import Context
from distill.job.materials import Blocks, cut_blocks
from distill.ledger import Entry, Ledger
from distill.plan import Costs, Plan, Span, boundaries_of, plan_broadcast
from distill.progress import BlockLine, Display
from distill.protocol import Checks, Feed, Schedule
from distill.recipes import replace_convolutions
from distill.report import plan_table
from distill.stream import RemoteStream, Stream, TeacherStream
from distill.trainer import BlockTrainer, Reading, TrainerOptions
from distill.transport import BoundaryReceiver, BoundarySender, Edge, Wire, wire_backend

log = logging.getLogger(__name__)


def train_blocks(context: Context, dataset: Dataset, teacher: nn.Module) -> Blocks:
    """Run the distill stage to its end (or up to the printed plan); blocks in the ledger are not trained again."""
    blocks = cut_blocks(context.config, dataset, teacher, context.device)
    if context.completed("distill") is None:
        stage = _DistillStage(context, dataset, blocks)
        plan = stage.plan()
        if context.config.stage is not Stage.plan:
            stage.run(plan)
    return blocks


class _DistillStage:
    """Wires plan, streams, trainers and collection of one attempt."""

    def __init__(self, context: Context, dataset: Dataset, blocks: Blocks) -> None:
        config = context.config
        self.context, self.dataset, self.blocks = context, dataset, blocks
        self.budget = config.distill.steps or 0
        if config.distill.epochs is not None:
            self.budget = math.ceil(config.distill.epochs * dataset.steps_per_epoch)
        plateau = config.distill.stop is Stop.plateau
        self.checks = Checks(config.distill.check_every, config.distill.check_batches) if plateau else Checks()
        self.checkpoints = CheckpointFolder(context.run.path, generation=context.control.generation)
        self.wire_dtype = torch.bfloat16 if config.plan.wire_dtype is WireDtype.bf16 else torch.float32
        self.wake = threading.Event()
        self.flops: BlockCosts | None = None
        self.ledger = Ledger(context.run.path) if context.leads else None

    # plan

    def plan(self) -> Plan:
        """Rank 0 makes the plan (every rank measures at the same time, as they will train); all get it."""
        costs = self._costs()
        if self.context.leads:
            assert costs is not None
            assert self.ledger is not None
            spans = [self._span(block) for block in self.blocks.replaced if block not in self.ledger.entries]
            plan = plan_broadcast(self._planning_costs(costs), spans, self.context.world_size)
            write_text(self.context.run.path / "plan.json", plan.to_json())
            self._show(plan, costs)
            self.context.control.set("plan", plan.to_json())
        return Plan.from_json(self.context.control.wait("plan", peer=0, purpose="plan"))

    def _span(self, block: int) -> Span:
        checkpoint = self.checkpoints.load(block_name(block))
        return Span(block, checkpoint.step if checkpoint else 0, self.budget)

    def _costs(self) -> BlockCosts | None:
        """Return the costs in seconds on rank 0, None elsewhere."""
        context = self.context
        sample = self.dataset.train_batch(0).images
        if context.leads:
            self.flops = flop_costs(self.blocks.chain, self._scratch_trainer, sample)
        if context.config.plan.cost is Cost.flops:
            return calibrated(self.flops, self.blocks.chain, sample) if self.flops else None
        context.control.set(f"measuring/{context.rank}", True)
        for peer in range(context.world_size):
            context.control.wait(f"measuring/{peer}", peer=peer, purpose="start of the measurement")
        mine = measured_costs(self.blocks.chain, self._scratch_trainer, sample)
        context.control.set(f"costs/{context.rank}", asdict(mine))
        if not context.leads:
            return None
        peers = range(context.world_size)
        return average([BlockCosts(**context.control.wait(f"costs/{r}", peer=r, purpose="costs") | {}) for r in peers])

    def _planning_costs(self, costs: BlockCosts) -> Costs:
        scale = self.wire_dtype.itemsize / torch.float32.itemsize
        sizes = tuple(int(boundary.nbytes * scale) for boundary in self.blocks.chain.boundaries)
        wire = WIRE_S_PER_BYTE if self.context.device.type == "cpu" else 0.0
        return Costs(tuple(costs.teacher), tuple(costs.student), sizes, wire)

    def _show(self, plan: Plan, costs: BlockCosts) -> None:
        assert self.flops is not None
        chain, context = self.blocks.chain, self.context
        sizes = [boundary.nbytes for boundary in chain.boundaries]
        table = plan_table(plan, [b.name for b in chain.blocks], costs=costs, flops=self.flops, boundary_bytes=sizes)
        context.console.print(table)
        write_json(
            context.run.path / "costs.json",
            {"blocks": [b.name for b in chain.blocks], "seconds": asdict(costs), "flops": asdict(self.flops)},
        )
        context.say(f"plan: {plan.strategy}, predicted makespan {plan.predicted_makespan_s:.1f} s")
        idle = [rank for rank, owned in enumerate(plan.owners) if not owned and rank > 0]
        if idle:
            log.warning("plan: %d ranks have no block and stay idle: ranks %s", len(idle), ", ".join(map(str, idle)))

    # trainers

    def _scratch_trainer(self, block: int) -> BlockTrainer | None:
        return self._trainer(block) if block in self.blocks.replaced else None

    def _trainer(self, block: int) -> BlockTrainer:
        """Return a block's trainer at step 0: its first weights are a function of (seed, block) alone."""
        config = self.context.config
        module = self.blocks.chain.block_module(block)
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "student", block))
        replace_convolutions(module, self.blocks.replaced[block], self.blocks.recipe, generator)
        module.to(self.context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        name = self.blocks.chain.blocks[block].name
        options = trainer_options(config)
        trainer = BlockTrainer(block, name, module, budget=self.budget, device=self.context.device, options=options)
        trainer.keep_finite(None)
        return trainer

    def _resumed_trainer(self, block: int) -> BlockTrainer:
        trainer = self._trainer(block)
        checkpoint = self.checkpoints.load(block_name(block))
        if checkpoint is not None:
            trainer.resume(checkpoint)
        return trainer

    # run

    def run(self, plan: Plan) -> None:
        """Train this rank's blocks; on rank 0 also teach, collect, and record the stage."""
        context = self.context
        trainers = [self._resumed_trainer(span.block) for span in plan.spans_of(context.rank)]
        started, cpu_started = time.monotonic(), time.process_time()
        with ExitStack() as stack:
            readings = _Readings(context)
            stack.callback(readings.close)
            if context.leads:
                self._lead(plan, trainers, readings, stack, started=started, cpu_started=cpu_started)
            elif trainers:
                self._follow(plan, trainers, readings, started=started, cpu_started=cpu_started)

    def _train(
        self, stream: Stream, trainers: list[BlockTrainer], deliverer: Collector | Deliverer, readings: _Readings
    ) -> None:
        context = self.context
        distill(
            stream,
            trainers,
            rank=context.rank,
            generation=context.control.generation,
            checks=self.checks,
            checkpoints=self.checkpoints,
            checkpoint_every=context.config.checkpoint.every,
            deliver=deliverer.deliver,
            report=readings.add,
        )

    def _follow(
        self, plan: Plan, trainers: list[BlockTrainer], readings: _Readings, *, started: float, cpu_started: float
    ) -> None:
        context = self.context
        chain = self.blocks.chain
        needed = boundaries_of(trainer.block for trainer in trainers)
        receiver = BoundaryReceiver(
            self._edge(context.rank),
            context.control.address.connect(),
            self._wire(),
            boundaries={k: chain.boundaries[k] for k in needed},
            num_boundaries=len(chain.boundaries),
        )
        deliverer = Deliverer(context.control, on_collected=lambda block: self.checkpoints.remove(block_name(block)))
        stream = RemoteStream(receiver)
        self._train(stream, trainers, deliverer, readings)
        busy = time.monotonic() - started
        deliverer.close()
        report = {"seconds": busy, "waited_s": stream.waited_s, "cpu_s": time.process_time() - cpu_started}
        context.control.set(f"rank/{context.rank}", report)

    def _lead(
        self,
        plan: Plan,
        trainers: list[BlockTrainer],
        readings: _Readings,
        stack: ExitStack,
        *,
        started: float,
        cpu_started: float,
    ) -> None:
        context, chain, ledger = self.context, self.blocks.chain, self.ledger
        assert ledger is not None
        display = stack.enter_context(self._display(plan))
        collector = Collector(
            context.control,
            ledger,
            blocks={span.block for span in plan.spans},
            wake=self.wake,
            on_recorded=lambda entry: self._recorded(entry, display),
        )
        senders = {
            rank: BoundarySender(
                self._edge(rank),
                context.control.address.connect(),
                self._wire(),
                num_boundaries=len(chain.boundaries),
                window=context.config.plan.window,
                on_free=self.wake.set,
            )
            for rank in range(1, context.world_size)
            if plan.owners[rank]
        }
        feeds = [Feed(rank, plan.spans_of(rank), self.checks) for rank in {0, *senders}]
        stream = TeacherStream(
            chain=chain,
            dataset=self.dataset,
            schedule=Schedule(feeds),
            senders=senders,
            wire_dtype=self.wire_dtype,
            finished_elsewhere=collector.finished_elsewhere,
            wake=self.wake,
            budget=self.budget,
            timeout_s=context.config.plan.timeout_s,
        )
        self._train(stream, trainers, collector, readings)
        mine = {"seconds": time.monotonic() - started, "waited_s": stream.waited_s}
        collector.wait()
        mine["cpu_s"] = time.process_time() - cpu_started
        makespan = time.monotonic() - started
        ranks = {0: mine} | {
            rank: context.control.wait(f"rank/{rank}", peer=rank, purpose="report of the distill stage")
            for rank in senders
        }
        context.run.complete("distill", self._result(plan, stream, senders, ranks, makespan))

    def _result(
        self,
        plan: Plan,
        stream: TeacherStream,
        senders: Mapping[int, BoundarySender],
        ranks: Mapping[int, Mapping[str, float]],
        makespan: float,
    ) -> dict[str, Any]:
        assert self.ledger is not None
        steps = max((self.ledger.entries[s.block].steps - s.first for s in plan.spans), default=0)
        idle = {rank: 1 - (r["seconds"] - r["waited_s"]) / makespan for rank, r in ranks.items()}
        return {
            "strategy": plan.strategy,
            "world_size": plan.world_size,
            "threads_per_rank": torch.get_num_threads(),
            "resumed": any(span.first > 0 for span in plan.spans) or len(plan.spans) < len(self.blocks.replaced),
            "generation": self.context.control.generation,
            "seconds": makespan,
            "makespan_predicted_s": plan.predicted_makespan_s,
            "images_per_second": steps * self.dataset.batch_size / makespan,
            "teacher_passes": stream.passes,
            "teacher_seconds": stream.teacher_s,
            "bytes_sent": sum(sender.bytes_sent for sender in senders.values()),
            "idle_share": [idle.get(rank, 1.0) for rank in range(plan.world_size)],
            "cpu_seconds": sum(r["cpu_s"] for r in ranks.values()),
        }

    def _recorded(self, entry: Entry, display: Display) -> None:
        self.checkpoints.remove(block_name(entry.block))
        display.finish(entry.block, status=entry.status, step=entry.steps, relative_error=entry.rel_error_last)

    def _display(self, plan: Plan) -> Display:
        chain, control = self.blocks.chain, self.context.control.second()
        lines = [
            BlockLine(span.block, chain.blocks[span.block].name, rank, span.budget, step=span.first)
            for rank in range(plan.world_size)
            for span in plan.spans_of(rank)
        ]

        def poll() -> dict[int, dict[str, float]]:
            latest: dict[int, dict[str, float]] = {}
            for rank in range(plan.world_size):
                latest |= {int(block): reading for block, reading in (control.get(f"readings/{rank}") or {}).items()}
            return latest

        lines.sort(key=lambda line: line.block)
        return Display(lines, batch_size=self.dataset.batch_size, poll=poll, console=self.context.console)

    def _edge(self, rank: int) -> Edge:
        return Edge(0, rank, self.context.control.generation, self.context.config.plan.timeout_s)

    def _wire(self) -> Wire:
        device = self.context.device
        backend = wire_backend(device, local_world_size=ranks_of(os.environ)[3])
        return Wire(dtype=self.wire_dtype, device=device, backend=backend)


class _Readings:
    """This rank's readings: to metrics/rankN.jsonl, and the latest of each block to rank 0's display."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._file = (context.run.path / "metrics" / f"rank{context.rank}.jsonl").open("a")
        self._latest: dict[int, dict[str, float]] = {}

    def add(self, reading: Reading) -> None:
        record = asdict(reading) | {"generation": self._context.control.generation, "time_s": time.time()}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._latest[reading.block] = asdict(reading)
        self._context.control.set(f"readings/{self._context.rank}", self._latest)

    def close(self) -> None:
        self._file.close()


def trainer_options(config: JobConfig) -> TrainerOptions:
    """Return how the configuration wants every block trained."""
    options = config.distill
    return TrainerOptions(
        loss=options.loss.name,
        optimizer=options.optimizer.name,
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        schedule=options.schedule.name,
        warmup_steps=options.warmup_steps,
        clip_norm=options.clip_norm,
        amp=options.amp.name,
        patience=options.patience if options.stop is Stop.plateau else 0,
        min_delta=options.min_delta,
        log_every=options.log_every,
    )


def assemble_student(context: Context, dataset: Dataset, teacher: nn.Module, blocks: Blocks) -> None:
    """Write assembled.safetensors (the blocks as they were trained) and recalibrated.safetensors (batch norms anew)."""

    def work() -> dict[str, Any]:
        start = time.monotonic()
        ledger = Ledger(context.run.path)
        paths = [path for block in sorted(blocks.replaced) for path in blocks.replaced[block]]
        weights = [ledger.weights(block) for block in sorted(blocks.replaced)]
        student = assemble(teacher, replaced=paths, recipe=blocks.recipe, blocks=weights)
        _save_network(context, "assembled", student)
        student.to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        batches = context.config.assemble.batchnorm_batches
        if batches > 0:
            recalibrate(student, (batch.images for batch in dataset.train_batches(0, batches)))
        _save_network(context, "recalibrated", student)
        context.say(f"assembled {len(weights)} student blocks; batch norms re-estimated on {batches} batches")
        return {"seconds": time.monotonic() - start}

    context.lead("assemble", work)


def _save_network(context: Context, name: str, network: nn.Module) -> None:
    write_bytes(context.run.path / f"{name}.safetensors", save(contiguous(network.state_dict())))


def empty_student(teacher: nn.Module, blocks: Blocks) -> nn.Module:
    """Return the student's architecture; its weights are for a state dict to fill."""
    paths = [path for block in sorted(blocks.replaced) for path in blocks.replaced[block]]
    return assemble(teacher, replaced=paths, recipe=blocks.recipe, blocks=())


def load_network(context: Context, name: str, network: nn.Module) -> nn.Module:
    """Fill a network from NAME.safetensors of the run directory and put it on the device, in eval mode."""
    network.load_state_dict(load_file(context.run.path / f"{name}.safetensors"))
    network.to(context.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval()
