"""Blocks of a student that learn to give in INT8 what they give in fp32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.blocks.cut import Granularity, cut
from distill.job.int8_training import WORST, trained_for_int8, with_weights

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.export


def unit(channels: int) -> nn.Module:
    """A convolution of which one weight of every output is so large that the levels of all others are coarse."""
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    conv.weight.data[:, 0, 0, 0] = 8.0
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


def images(step: int) -> Any:
    return SimpleNamespace(images=torch.randn(16, 8, 8, 8, generator=torch.Generator().manual_seed(step)))


def test_the_worst_blocks_learn_and_the_same_bits_come_again() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(*(unit(8) for _ in range(WORST + 1))).eval()
    before = {name: one.clone() for name, one in student.state_dict().items()}
    chain = cut(student, images(0).images, granularity=Granularity.conv)
    dataset: Any = SimpleNamespace(train_batch=images, validation_batch=lambda index: images(10**6 + index))
    weights, errors = trained_for_int8(chain, dataset, steps=10)
    assert len(errors) == WORST
    assert sum(after for _, after in errors.values()) < sum(first for first, _ in errors.values())
    assert all(torch.equal(one, before[name]) for name, one in student.state_dict().items()), "fp32 stays as it is"
    found: dict[str, Tensor] = with_weights(student, weights).state_dict()
    changed = {name for name, one in found.items() if not torch.equal(one, before[name])}
    assert changed
    assert changed <= weights.keys()
    assert not any("running" in name for name in changed)
    again, _ = trained_for_int8(chain, dataset, steps=10)
    assert all(torch.equal(one, again[name]) for name, one in weights.items())
