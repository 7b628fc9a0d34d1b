"""The training loop over a made-up stream: who trains on what, what is handed over, and what is kept on the way."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn

from distill.distributed.edges.receiver import Delivery
from distill.engine.loop import Attempt, Outlets, distill
from distill.engine.rebalance.moves import Move
from distill.observability.trace import Trace
from distill.planning.schedule import Address, Checks
from distill.planning.unit import Proposal, Unit, number_units
from distill.storage.checkpoint import Checkpoint, CheckpointFolder, unit_name
from distill.storage.ledger import Entry
from distill.training.optim import TrainerOptions
from distill.training.trainer import BlockTrainer, Reading
from tests.training import NotedLane

BUDGET = 12
NO_CHECKS = Checks()


def batch(step: int, *, blocks: int = 2) -> dict[int, Tensor]:
    return {k: torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * step + k)) for k in range(blocks + 1)}


class Addresses:
    """A stream that walks through all addresses up to the budget for as long as some block is not finished; `moves`
    happen before the batch of their step, or of `moved_at`."""

    def __init__(
        self,
        *,
        blocks: int,
        checks: Checks,
        bad_step: int | None = None,
        moves: Sequence[Move] = (),
        moved_at: int | None = None,
    ) -> None:
        self.finished: list[int] = []
        self._moves, self._moved_at = moves, moved_at
        self._blocks, self._checks, self._bad_step = blocks, checks, bad_step

    def __iter__(self) -> Iterator[Delivery | Move]:
        address = Address(0)
        while address.step < BUDGET and len(self.finished) < self._blocks:
            if address.is_training:
                yield from (move for move in self._moves if address.step == (self._moved_at or move.step))
            boundaries = batch(address.step + 100 * (address.check + 1), blocks=self._blocks)
            if address.step == self._bad_step:
                boundaries[0] = boundaries[0] * math.nan
            yield Delivery(address, boundaries)
            address = self._checks.after(address)

    def finish(self, block: int) -> None:
        self.finished.append(block)


def trainer(block: int, *, budget: int = BUDGET, **options: Any) -> BlockTrainer:
    torch.manual_seed(block)
    settings = TrainerOptions(log_every=100, **options)
    module = nn.Linear(3, 3)
    return BlockTrainer(
        Unit.of_block(block, f"layer{block}"), module, budget=budget, device=torch.device("cpu"), options=settings
    )


class Outcome:
    """What the loop handed over and read."""

    def __init__(self, folder: Path) -> None:
        self.entries: list[Entry] = []
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.readings: list[Reading] = []
        self.checkpoints = CheckpointFolder(folder, generation=1)
        self.saved: list[int] = []
        self.given: dict[int, Checkpoint | None] = {}
        self.coming: BlockTrainer | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        self.saved.append(checkpoint.step)
        self.checkpoints.save(checkpoint)

    def outlets(self, every: int) -> Outlets:
        return Outlets(deliver=self.deliver, save=self.save, checkpoint_every=every, report=self.read, exchange=self)

    def read(self, _: BlockTrainer, reading: Reading) -> None:
        self.readings.append(reading)

    def give(self, move: Move, state: Checkpoint | None) -> None:
        self.given[move.unit] = state

    def take(self, move: Move) -> BlockTrainer | None:
        return self.coming

    def deliver(self, entry: Entry, blob: bytes) -> None:
        self.entries.append(entry)
        self.weights[entry.unit] = load(blob)


def run(
    folder: Path,
    trainers: list[BlockTrainer],
    *,
    checks: Checks = NO_CHECKS,
    every: int = 100,
    coming: BlockTrainer | None = None,
    **stream: Any,
) -> tuple[Outcome, Addresses]:
    num_blocks = 1 + max(one.unit.number for one in [*trainers, coming] if one is not None)
    outcome, addresses = Outcome(folder), Addresses(blocks=num_blocks, checks=checks, **stream)
    outcome.coming = coming
    distill(
        addresses,
        trainers,
        outcome.outlets(every),
        attempt=Attempt(3, 2, time.monotonic()),
        checks=checks,
        trace=Trace(),
    )
    return outcome, addresses


def test_every_block_is_trained_to_its_budget_and_handed_over_once(tmp_path: Path) -> None:
    trainers = [trainer(0, budget=5), trainer(1)]
    outcome, addresses = run(tmp_path, trainers)
    assert [(entry.unit, entry.steps, entry.status) for entry in outcome.entries] == [
        (0, 5, "finished"),
        (1, 12, "finished"),
    ]
    assert addresses.finished == [0, 1]
    assert {(entry.rank, entry.generation) for entry in outcome.entries} == {(3, 2)}
    for block, budget in ((0, 5), (1, BUDGET)):
        alone = trainer(block, budget=budget)
        for step in range(budget):
            alone.update(batch(step)[block], batch(step)[block + 1])
        assert all(torch.equal(outcome.weights[block][n], t) for n, t in alone.module.state_dict().items())


def tensor_bytes(one: BlockTrainer) -> int:
    """What a trainer still holds."""
    state = [t for kept in one._optimizer.state.values() for t in kept.values() if isinstance(t, Tensor)]
    last = [*one._finite.weights.values(), *one._finite.optimizer.values()]
    return sum(t.nbytes for t in [*one.module.parameters(), *one.module.buffers(), *state, *last])


class Watching(Addresses):
    """Notes at every batch what each of some trainers still holds."""

    def __init__(self, trainers: Sequence[BlockTrainer], **usual: Any) -> None:
        super().__init__(checks=NO_CHECKS, **usual)
        self.trainers, self.held = trainers, list[list[int]]()

    def __iter__(self) -> Iterator[Delivery | Move]:
        for delivery in super().__iter__():
            self.held.append([tensor_bytes(one) for one in self.trainers])
            yield delivery


@pytest.mark.parametrize("given", [False, True])
def test_a_block_is_freed_as_soon_as_it_is_handed_over_or_given_away(tmp_path: Path, given: bool) -> None:
    trainers = [trainer(0, budget=BUDGET if given else 5), trainer(1)]
    moves = [Move(0, 0, 3, 1, 5)] if given else []
    watching, outcome = Watching(trainers, blocks=2, moves=moves), Outcome(tmp_path)
    if given:
        watching.finished.append(0)  # elsewhere
    distill(
        watching, trainers, outcome.outlets(100), attempt=Attempt(3, 2, time.monotonic()), checks=NO_CHECKS,
        trace=Trace(),
    )  # fmt: skip
    after = 6 + given  # of what was yielded: batches, and the move before its step
    assert all(held[0] > 0 for held in watching.held[:5])
    assert {held[0] for held in watching.held[after:]} == {0}
    assert all(held[1] > 0 for held in watching.held)
    assert tensor_bytes(trainers[1]) == 0
    if given:
        state = outcome.given[0]
        assert state is not None
        assert all(tensor.numel() for tensor in state.weights.values())
    else:
        assert outcome.weights[0]["weight"].numel() == 9


def test_a_block_that_has_come_to_its_end_is_given_away_as_such(tmp_path: Path) -> None:
    moves = [Move(0, 0, 3, 1, 8)]
    outcome, _ = run(tmp_path, [trainer(0, budget=5), trainer(1)], moves=moves)
    assert outcome.given == {0: None}
    assert [entry.unit for entry in outcome.entries] == [0, 1]


def test_an_entry_tells_of_the_course_of_its_block(tmp_path: Path) -> None:
    one = trainer(0)
    outcome, _ = run(tmp_path, [one])
    (entry,) = outcome.entries
    assert (entry.rel_error_first, entry.rel_error_last) == (one.progress.rel_error_first, one.progress.rel_error_last)
    assert entry.rel_error_first != entry.rel_error_last
    assert entry.seconds == one.progress.seconds > 0


def test_readings_are_reported(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, [trainer(0)])
    assert [(reading.unit, reading.step) for reading in outcome.readings] == [(0, 1), (0, BUDGET)]


def test_blocks_train_and_look_on_their_lanes(tmp_path: Path) -> None:
    one, seen = trainer(0), set()
    one.lane = lane = NotedLane()
    one.module.register_forward_hook(lambda module, *_: seen.add((module.training, lane.inside)))
    run(tmp_path, [one], checks=Checks(every=4, batches=1))
    assert seen == {(True, True), (False, True)}


def test_a_block_resumed_further_ahead_lets_earlier_batches_pass(tmp_path: Path) -> None:
    whole, _ = run(tmp_path, [trainer(0), trainer(1)])
    begun = trainer(1)
    for step in range(7):
        begun.update(batch(step)[1], batch(step)[2])
    state = begun.checkpoint()
    assert state is not None
    resumed = trainer(1)
    resumed.resume(state)
    again, _ = run(tmp_path, [trainer(0), resumed])
    for block in (0, 1):
        assert all(torch.equal(whole.weights[block][n], t) for n, t in again.weights[block].items())


def test_a_block_resumed_further_ahead_does_not_look_again_at_what_it_has_seen(tmp_path: Path) -> None:
    looks, options = Checks(every=4, batches=1), {"lr": 0.0, "patience": 100}
    whole = trainer(1, **options)
    outcome, _ = run(tmp_path, [trainer(0, **options), whole], checks=looks, every=4)
    state = outcome.checkpoints.load(unit_name(1))
    assert state is not None
    assert state.step == 8
    resumed = trainer(1, **options)
    resumed.resume(state)
    run(tmp_path / "again", [trainer(0, **options), resumed], checks=looks)
    assert resumed.progress.looks_without_improvement == whole.progress.looks_without_improvement > 0


def test_a_block_resumed_at_its_end_is_handed_over_without_a_batch(tmp_path: Path) -> None:
    done = trainer(0)
    done.step = BUDGET
    outcome, _ = run(tmp_path, [done, trainer(1)])
    assert [entry.unit for entry in outcome.entries] == [0, 1]


def test_a_block_that_missed_a_batch_is_a_bug_of_ours(tmp_path: Path) -> None:
    class Late(Addresses):
        def __iter__(self) -> Iterator[Delivery]:
            yield Delivery(Address(5), batch(5))

    outcome = Outcome(tmp_path)
    with pytest.raises(AssertionError, match="a batch was missed before"):
        distill(
            Late(blocks=1, checks=Checks()),
            [trainer(0)],
            outcome.outlets(1),
            attempt=Attempt(0, 0, time.monotonic()),
            checks=Checks(),
            trace=Trace(),
        )


def test_checkpoints_are_written_at_their_interval_and_after_the_looks_of_a_step(tmp_path: Path) -> None:
    looks = Checks(every=4, batches=2)
    outcome, _ = run(tmp_path, [trainer(0, patience=100)], checks=looks, every=4)
    state = outcome.checkpoints.load(unit_name(0))
    assert state is not None
    assert state.step == 8  # the one at 12 is the end, which is handed over instead
    assert state.progress["rel_error_held_out"] is not None


def test_no_checkpoint_is_written_of_a_block_at_its_end(tmp_path: Path) -> None:
    outcome, _ = run(tmp_path, [trainer(0, budget=8)], every=4)
    assert outcome.saved == [4]


def test_a_checkpoint_waits_for_the_looks_of_its_step(tmp_path: Path) -> None:
    """One before them would be resumed without them, and the block would stop later than in one go."""
    looked = []

    def note(checkpoint: Checkpoint) -> None:
        looked.append((checkpoint.step, checkpoint.progress["rel_error_held_out"] is not None))

    distill(
        Addresses(blocks=1, checks=(looks := Checks(every=4, batches=2))),
        [trainer(0, patience=100)],
        replace(Outcome(tmp_path).outlets(4), save=note),
        attempt=Attempt(0, 1, time.monotonic()),
        checks=looks,
        trace=Trace(),
    )
    assert looked == [(4, True), (8, True)]


def test_a_block_on_its_plateau_stops_early_and_says_so_to_the_stream(tmp_path: Path) -> None:
    looks = Checks(every=2, batches=1)
    outcome, addresses = run(tmp_path, [trainer(0, lr=0.0, patience=1, min_delta=0.99)], checks=looks)
    assert addresses.finished == [0]
    assert outcome.entries[0].steps < BUDGET


@pytest.mark.parametrize("every", [100, 4], ids=["at the end", "at a checkpoint"])
def test_a_block_that_has_diverged_is_handed_over_wherever_it_is_noticed(
    tmp_path: Path, every: int, caplog: pytest.LogCaptureFixture
) -> None:
    outcome, addresses = run(tmp_path, [trainer(0)], every=every, bad_step=6)
    assert addresses.finished == [0]
    assert [(e.status, e.diverged_at, e.steps) for e in outcome.entries] == [("diverged", 6, 4 if every == 4 else 0)]
    assert all(tensor.isfinite().all() for tensor in outcome.weights[0].values())
    assert "block layer0: its loss is not finite at step 6; it is stopped" in caplog.text


def test_units_train_on_their_own_boundaries_which_several_may_have_in_common(tmp_path: Path) -> None:
    """Two candidates of the second block, and one in the place of both blocks; each with the bits that it has alone."""

    def made(unit: Unit) -> BlockTrainer:
        torch.manual_seed(unit.number)
        options = TrainerOptions(log_every=100)
        return BlockTrainer(unit, nn.Linear(3, 3), budget=BUDGET, device=torch.device("cpu"), options=options)

    proposals = [Proposal("a", 1, 2), Proposal("b", 1, 2), Proposal("c", 0, 2)]
    units = number_units(proposals, ["first", "second"])
    found: dict[int, dict[str, Tensor]] = {}
    for place, group in enumerate([units, *([unit] for unit in units)]):
        outcome, _ = run(tmp_path / str(place), [made(unit) for unit in group])
        found = found or outcome.weights
        assert {unit.number for unit in group} == set(outcome.weights)
        for number, weights in outcome.weights.items():
            assert all(torch.equal(found[number][name], tensor) for name, tensor in weights.items())


class TestMoves:
    away, here = Move(0, 1, source=3, target=0, step=5), Move(0, 1, source=0, target=3, step=5)  # the loop is rank 3's

    def test_a_block_that_changes_ranks_ends_with_the_same_bits(self, tmp_path: Path) -> None:
        whole, _ = run(tmp_path / "whole", [trainer(0), trainer(1)])
        giver, _ = run(tmp_path / "giver", [trainer(0), trainer(1)], moves=[self.away])
        state = giver.given[1]
        assert state is not None
        assert state.step == 5
        assert [entry.unit for entry in giver.entries] == [0]
        coming = trainer(1)
        coming.take_over(state)
        taker, _ = run(tmp_path / "taker", [trainer(0)], moves=[self.here], coming=coming)
        assert [entry.unit for entry in taker.entries] == [0, 1]
        for outcome in (giver, taker):
            for block, weights in outcome.weights.items():
                assert all(torch.equal(whole.weights[block][n], tensor) for n, tensor in weights.items())

    def test_a_block_that_comes_further_ahead_lets_earlier_batches_pass(self, tmp_path: Path) -> None:
        """As where two blocks come to a rank at once, from ranks that were not equally far."""
        whole, _ = run(tmp_path / "whole", [trainer(0), trainer(1)])
        giver, _ = run(tmp_path / "giver", [trainer(0), trainer(1)], moves=[self.away])
        coming, state = trainer(1), giver.given[1]
        assert state is not None
        coming.take_over(state)
        taker, _ = run(tmp_path / "taker", [trainer(0)], moves=[self.here], moved_at=2, coming=coming)
        for block, weights in taker.weights.items():
            assert all(torch.equal(whole.weights[block][n], tensor) for n, tensor in weights.items())

    def test_a_block_that_has_come_to_its_end_stays_where_it_did(self, tmp_path: Path) -> None:
        outcome, _ = run(tmp_path, [trainer(0), trainer(1, budget=4)], moves=[self.away])
        assert outcome.given == {1: None}
        assert [entry.unit for entry in outcome.entries] == [1, 0]

    def test_a_block_found_to_have_diverged_when_it_should_go_is_handed_in_instead(self, tmp_path: Path) -> None:
        outcome, addresses = run(tmp_path, [trainer(0)], moves=[Move(0, 0, 3, 0, step=8)], bad_step=6)
        assert outcome.given == {0: None}
        assert [(e.status, e.diverged_at) for e in outcome.entries] == [("diverged", 6)]
        assert addresses.finished == [0]

    def test_nothing_is_trained_where_the_block_ended_before_it_came(self, tmp_path: Path) -> None:
        outcome, _ = run(tmp_path, [trainer(0)], moves=[self.here], coming=None)
        assert [entry.unit for entry in outcome.entries] == [0]

    def test_a_block_that_diverges_after_its_move_keeps_the_weights_of_its_last_checkpoint(
        self, tmp_path: Path
    ) -> None:
        whole, _ = run(tmp_path, [trainer(0)], every=4, bad_step=7)
        giver, _ = run(tmp_path, [trainer(0)], every=4, moves=[Move(0, 0, 3, 0, step=6)])
        coming, state = trainer(0), giver.checkpoints.load(unit_name(0))
        assert state is not None
        assert giver.given[0] is not None
        coming.resume(state)
        coming.take_over(giver.given[0])
        taker, _ = run(tmp_path, [], moves=[Move(0, 0, 0, 3, step=6)], coming=coming, bad_step=7)
        assert [(e.status, e.diverged_at, e.steps) for e in taker.entries] == [("diverged", 7, 4)]
        assert all(torch.equal(whole.weights[0][n], tensor) for n, tensor in taker.weights[0].items())
