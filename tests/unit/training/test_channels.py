"""Boundaries of students that are narrower than their teacher."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill.planning.unit import Channels, Unit
from distill.training.channels import ChannelMap
from distill.training.optim import TrainerOptions
from distill.training.trainer import BlockTrainer
from tests.training import CPU


def images(channels: int = 4) -> torch.Tensor:
    return torch.randn(2, channels, 3, 5, generator=torch.Generator().manual_seed(0))


def test_a_slice_has_the_bits_of_the_teacher_s_channels() -> None:
    x = images()
    assert torch.equal(ChannelMap(((3,), (1,)), CPU)(x), x[:, [3, 1]])


def test_groups_are_means_and_may_differ_in_size() -> None:
    x = images()
    found = ChannelMap(((0, 2, 3), (1,)), CPU)(x)
    assert torch.allclose(found, torch.stack([x[:, [0, 2, 3]].mean(1), x[:, 1]], dim=1))


@pytest.mark.parametrize("channels", [((0,), (2,)), ((0, 1), (2, 3))])
def test_the_memory_format_stays(channels: Channels) -> None:
    x = images().to(memory_format=torch.channels_last)
    assert ChannelMap(channels, CPU)(x).is_contiguous(memory_format=torch.channels_last)


def test_tokens_have_their_channels_in_the_second_dimension_too() -> None:
    assert ChannelMap(((0,), (1, 2)), CPU)(torch.ones(2, 3, 7)).shape == (2, 2, 7)


@pytest.mark.parametrize("channels", [(), ((0,), ())])
def test_a_channel_of_nothing_is_refused(channels: Channels) -> None:
    with pytest.raises(ValueError, match="one or more"):
        ChannelMap(channels, CPU)


def test_a_unit_s_maps_decide_what_it_reads_and_what_it_is_to_give() -> None:
    """A student of two channels for two of the teacher's four: it is right where it copies what it reads."""
    unit = Unit(0, "narrow", 0, 1, "narrow", reads=((0,), (3,)), gives=((1,), (2, 3)))
    copy = nn.Conv2d(2, 2, 1, bias=False)
    with torch.no_grad():
        copy.weight.copy_(torch.eye(2)[..., None, None])
    trainer = BlockTrainer(unit, copy, budget=9, device=CPU, options=TrainerOptions())
    inputs, targets = images(), images()
    targets[:, 1], targets[:, 2], targets[:, 3] = inputs[:, 0], inputs[:, 3], inputs[:, 3]
    trainer.look(inputs, targets, last=True)
    assert trainer.progress.rel_error_held_out == 0.0
    first = trainer.update(inputs, targets + 1)
    assert first is not None
    assert first.loss > 0
