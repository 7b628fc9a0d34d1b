"""What progressive distillation trains: a block amid frozen ones, by the teacher's boundaries and for the whole."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from distill.blocks.chain import Chain
from distill.data import Batch
from distill.training.losses import relative_error
from distill.training.objective import Address, Labels, Outputs, Seen, Tapped
from distill.training.progressive import Amid, Progressive, Target, TeacherBlocks

ROWS, CLASSES = 4, 3
HERE = Address(seed=0, step=0)


def block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())


def head() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, CLASSES))


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(0)
    return Batch(torch.randn(ROWS, 3, 4, 4), torch.arange(ROWS) % CLASSES)


class Blocks:
    """As much of a chain as a teacher needs: blocks in a row."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules, self.asked = [module.eval() for module in modules], (0, frozenset[int]())

    def run(self, x: Tensor, *, last: int, keep: Collection[int]) -> dict[int, Tensor]:
        self.asked = last, frozenset(keep)
        found = {0: x}
        for boundary, module in enumerate(self.modules[:last], 1):
            found[boundary] = module(found[boundary - 1])
        return {boundary: found[boundary] for boundary in keep}


def test_only_the_block_learns_and_only_it_is_in_training_mode(batch: Batch) -> None:
    before, behind = block(), head()
    network = Amid([before], block(), [behind])
    network.train()
    assert [name.partition(".")[0] for name in network.state_dict()] == ["block"] * len(network.state_dict())
    kept = copy.deepcopy((before.state_dict(), behind.state_dict()))
    network(batch.images).square().mean().backward()
    assert network.block.training
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert not any(module.training for module in (*before.modules(), *behind.modules()))
    assert all(parameter.grad is None for parameter in (*before.parameters(), *behind.parameters()))
    for module, state in zip((before, behind), kept, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


def test_the_loss_is_that_of_the_blocks_and_of_the_whole_network(batch: Batch) -> None:
    torch.manual_seed(1)
    student, teacher = nn.Sequential(block(), block(), head()).eval(), Blocks(block(), block(), head())
    targets = {"0": Target(1), "1": Target(2)}
    source = TeacherBlocks(cast(Chain, teacher), targets, last=3)
    seen = Seen(Tapped(student, [*targets])(batch.images), batch, HERE, source)
    blocks = sum(relative_error(seen.student.taps[str(k)], seen.teacher.taps[str(k)]) for k in (0, 1))
    whole = Labels()(seen)
    for weight in (0.0, 0.5):
        loss = Progressive([*targets], Labels(), weight=weight)(seen)
        torch.testing.assert_close(loss, blocks + weight * whole)
    assert teacher.asked == (3, {1, 2, 3})
    assert torch.equal(seen.teacher.logits, teacher.modules[2](seen.teacher.taps["1"]))


def test_a_teacher_runs_no_further_than_the_block_and_gives_what_a_narrower_student_has(batch: Batch) -> None:
    teacher = Blocks(block(), block(), head())
    source = TeacherBlocks(cast(Chain, teacher), {"block": Target(1, ((0,), (1, 2)))}, last=1)
    found: Outputs = source.outputs(batch, HERE)
    assert teacher.asked == (1, {1})
    assert found.taps["block"].shape == (ROWS, 2, 4, 4)
    torch.testing.assert_close(found.taps["block"][:, 1], found.logits[:, 1:].mean(1))
    assert not found.logits.requires_grad
