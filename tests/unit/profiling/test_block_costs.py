"""Costs of blocks: FLOPs by hand, seconds where they are measured, and networks that can only be hooked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from distill.blocks.bf16 import Bf16Chain
from distill.blocks.chain import Chain
from distill.blocks.cut import Granularity, cut
from distill.planning.unit import Proposal, Unit, number_units
from distill.profiling import block_costs as cost
from distill.profiling.block_costs import (
    BlockCosts,
    Students,
    average,
    calibrated,
    count_flops,
    flop_costs,
    measured_costs,
    slowness,
    step_bytes,
    sustained_costs,
)  # fmt: skip
from distill.profiling.sizes import Sizes, block_sizes
from distill.training.optim import TrainerOptions
from distill.training.trainer import BlockTrainer, Reading
from tests.training import NotedLane

BATCH, SIZE = 4, 6
SAMPLE = torch.zeros(BATCH, 3, SIZE, SIZE)


def chain() -> Chain:
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(5, 7, 1, bias=False))
    return cut(network, SAMPLE, granularity=Granularity.conv)


def trainer(cut_chain: Chain, block: int) -> BlockTrainer:
    module = cut_chain.block_module(block)
    return BlockTrainer(
        Unit.of_block(block, "b"), module, budget=100, device=torch.device("cpu"), options=TrainerOptions()
    )


def students(cut_chain: Chain, *blocks: int) -> Students:
    return {Unit.of_block(block, "b"): partial(trainer, cut_chain, block) for block in blocks}


def test_candidates_of_one_block_and_a_student_of_several_are_priced_on_their_own() -> None:
    """Two candidates of the second block, and one in the place of both blocks."""
    cut_chain = chain()
    block, other, both = number_units(
        [Proposal("a", 1, 2), Proposal("b", 1, 2), Proposal("c", 0, 2)], ["first", "second"]
    )
    assert [unit.number for unit in (block, other, both)] == [1, 2, 3]
    wide = nn.Conv2d(3, 7, 3, padding=1, bias=False)

    def make(unit: Unit, module: nn.Module) -> BlockTrainer:
        return BlockTrainer(unit, module, budget=9, device=torch.device("cpu"), options=TrainerOptions())

    made = {
        block: partial(trainer, cut_chain, 1),
        other: lambda: make(other, nn.Conv2d(5, 7, 3, padding=1, bias=False)),
        both: lambda: make(both, wide),
    }
    found = flop_costs(cut_chain, made, SAMPLE)
    assert found.student[0] == 0
    assert found.student[2] == 9 * found.student[1], "3 x 3 for 1 x 1, on the same boundary"
    assert found.student[3] == 2 * 2 * 9 * 3 * 7 * SIZE * SIZE * BATCH, "on the network's input"
    assert len(step_bytes(cut_chain, made, SAMPLE)) == 4
    sizes = block_sizes(cut_chain, made, SAMPLE)[1]
    assert sizes.params == (None, 5 * 7, 9 * 5 * 7, 9 * 3 * 7)


def test_flops_count_two_per_multiply_add_for_the_whole_batch() -> None:
    found = flop_costs(chain(), {}, SAMPLE)
    pixels = SIZE * SIZE * BATCH
    assert found.teacher == (2 * 9 * 3 * 5 * pixels, 2 * 5 * 7 * pixels)
    assert found.student == (0.0, 0.0)


def test_a_student_step_counts_forward_and_backward() -> None:
    cut_chain = chain()
    found = flop_costs(cut_chain, students(cut_chain, 1), SAMPLE)
    assert found.student[0] == 0.0
    # forward and the gradient of the weights; the input of a block needs no gradient
    assert found.student[1] == 2 * found.teacher[1]


def test_sizes_are_those_of_one_image_in_use() -> None:
    cut_chain = chain()
    teacher, student = block_sizes(cut_chain, students(cut_chain, 1), SAMPLE.repeat(2, 1, 1, 1))
    assert teacher == Sizes((9 * 3 * 5, 5 * 7), (2 * 9 * 3 * 5 * SIZE * SIZE, 2 * 5 * 7 * SIZE * SIZE))
    assert student == Sizes((None, 5 * 7), (None, 2 * 5 * 7 * SIZE * SIZE)), "without what training costs"


def test_sizes_are_the_same_beside_a_teacher_in_bf16() -> None:
    cut_chain = chain()
    plain = block_sizes(cut_chain, students(cut_chain, 0, 1), SAMPLE)
    assert block_sizes(Bf16Chain(cut_chain), students(cut_chain, 0, 1), SAMPLE) == plain


def test_measured_seconds_are_positive_where_there_is_work() -> None:
    cut_chain = chain()
    found = measured_costs(cut_chain, students(cut_chain, 0), SAMPLE, steps=1)
    assert all(seconds > 0 for seconds in found.teacher)
    assert found.student[0] > 0
    assert found.student[1] == 0.0


def test_sustained_costs_are_those_of_whole_steps_in_the_proportions_of_the_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut_chain = chain()
    num_blocks = len(cut_chain.blocks)
    blocks = [1.0 + block for block in range(num_blocks)] + [2.0 + block for block in range(2)]
    together = [8.0, 12.0, 10.0]  # the teacher, all students, and both, which overlap
    answers = iter([*blocks, *together])

    def timed(call: Callable[[], object], **_: object) -> float:
        call()
        return next(answers)

    monkeypatch.setattr(cost, "_sustained", timed)
    found = sustained_costs(cut_chain, students(cut_chain, 0, 1), lambda: SAMPLE)
    assert sum(found.teacher) == pytest.approx(4.0)
    assert sum(found.student) == pytest.approx(6.0)
    assert found.teacher[1] / found.teacher[0] == pytest.approx(2.0)
    assert all(seconds > 0 for seconds in found.student)
    assert next(answers, None) is None


def sustained(chain: Chain, students: Students, sample: Tensor) -> BlockCosts:
    return sustained_costs(chain, students, lambda: sample)


@pytest.mark.parametrize("costs", [sustained, flop_costs, partial(measured_costs, steps=1), step_bytes])
def test_steps_are_tried_on_their_lanes(monkeypatch: pytest.MonkeyPatch, costs: Callable[..., object]) -> None:
    lane, cut_chain, seen = NotedLane(), chain(), set()

    def made(block: int) -> BlockTrainer:
        one = trainer(cut_chain, block)
        one.lane = lane
        return one

    usual = BlockTrainer.update

    def update(self: BlockTrainer, inputs: Tensor, targets: Tensor) -> Reading | None:
        seen.add(lane.inside)
        return usual(self, inputs, targets)

    monkeypatch.setattr(BlockTrainer, "update", update)
    monkeypatch.setattr(cost, "BUDGET_S", 0.0)
    monkeypatch.setattr(cost, "SPELL_S", 0.0)
    costs(cut_chain, {Unit.of_block(0, "b"): partial(made, 0)}, SAMPLE)
    assert seen == {True}


@pytest.mark.parametrize(("steps", "rounds"), [(0, 4), (50, 4), (500, 10), (10**6, 20)])
def test_a_long_job_is_measured_longer_up_to_a_limit(monkeypatch: pytest.MonkeyPatch, steps: int, rounds: int) -> None:
    seconds = 0.0

    def per_block(*_: object) -> BlockCosts:
        nonlocal seconds
        seconds += 1.0
        return BlockCosts((0.75, 0.0), (0.25, 0.0))

    monkeypatch.setattr(cost, "_costs", per_block)
    monkeypatch.setattr("distill.profiling.block_costs.time.perf_counter", lambda: seconds)
    monkeypatch.setattr(cost, "BUDGET_S", 2.0)
    monkeypatch.setattr(cost, "LONGEST_S", 20.0)
    measured_costs(chain(), {}, SAMPLE, steps=steps)
    assert seconds == rounds


def test_a_rank_that_measures_ahead_is_at_other_blocks_after_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_chain, updated = chain(), list[int]()
    monkeypatch.setattr(BlockTrainer, "update", lambda self, *_: updated.append(self.unit.number))
    monkeypatch.setattr(cost, "_blocks_within", lambda _costs, _units, share: round(2 * share))
    monkeypatch.setattr(cost, "BUDGET_S", 0.0)
    measured_costs(cut_chain, students(cut_chain, 0, 1), SAMPLE, steps=0, ahead=0.5)
    assert updated == [0, 1, 0, 0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(("share", "blocks"), [(0.0, 0), (0.5, 1), (0.6, 2), (0.75, 2), (1.0, 3)])
def test_how_far_ahead_is_a_share_of_the_seconds(share: float, blocks: int) -> None:
    units = [Unit.of_block(block, "b") for block in range(3)]
    assert cost._blocks_within(BlockCosts((1.0, 0.0, 2.0), (1.0, 0.4, 0.0)), units, share) == blocks


def test_calibration_keeps_the_shares_of_the_flops() -> None:
    flops = BlockCosts((100.0, 300.0), (200.0, 0.0))
    found = calibrated(flops, chain(), SAMPLE)
    assert found.teacher[1] / found.teacher[0] == pytest.approx(3.0)
    assert found.student[0] / found.teacher[0] == pytest.approx(2.0)


def test_the_average_over_ranks_is_taken_block_by_block() -> None:
    assert average([BlockCosts((1.0, 2.0), (3.0, 0.0)), BlockCosts((3.0, 2.0), (5.0, 0.0))]) == BlockCosts(
        (2.0, 2.0), (4.0, 0.0)
    )


class DataDependent(nn.Module):
    """torch.fx cannot trace the branch, so this network can only be hooked."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.second = nn.Conv2d(5, 5, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.sum() > 1e9:
            x = x * 2
        return self.second(x)


def test_what_lies_between_hooked_modules_is_priced_as_the_difference_it_makes() -> None:
    hooked = cut(DataDependent(), SAMPLE, granularity=Granularity.modules, modules=["first", "second"])
    found = flop_costs(hooked, {}, SAMPLE)
    pixels = SIZE * SIZE * BATCH
    by_name = dict(zip((block.name for block in hooked.blocks), found.teacher, strict=True))
    assert by_name["first"] == 2 * 9 * 3 * 5 * pixels
    assert by_name["second"] == 2 * 9 * 5 * 5 * pixels
    assert sum(found.teacher) == count_flops(lambda: hooked.run(SAMPLE, last=len(hooked.blocks), keep=()))


def test_a_rank_is_slow_by_the_median_over_its_blocks_and_small_differences_are_noise() -> None:
    usual = BlockCosts((1.0, 1.0, 1.0), (2.0, 0.0, 2.0))
    slow = BlockCosts((2.0, 2.0, 2.0), (4.0, 0.0, 40.0))
    assert slowness([usual, slow]) == pytest.approx((2 / 3, 4 / 3))
    assert slowness([usual, BlockCosts((1.1, 1.1, 1.1), (2.1, 0.0, 2.1))]) == (1.0, 1.0)


@pytest.mark.parametrize(("groups", "transposed"), [(1, False), (4, False), (8, False), (1, True)])
def test_the_gradients_of_a_convolution_cost_its_forward_each_also_in_groups(groups: int, transposed: bool) -> None:
    build = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    conv = build(8, 8, 3, padding=1, groups=groups, bias=False)
    images = torch.zeros(2, 8, 6, 6, requires_grad=True)
    forward = count_flops(lambda: conv(images))
    assert forward == 2 * 9 * 8 * 8 // groups * 2 * 6 * 6
    assert count_flops(lambda: conv(images).sum().backward()) == 3 * forward
