"""The average of weights: what it is, that it is judged, and that the network goes on from its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill.training.averaged import Averaged


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


def drift(model: nn.Module, averaged: Averaged, steps: range) -> None:
    for step in steps:
        with torch.no_grad():
            for tensor in (*model.parameters(), model[1].running_mean):  # type: ignore[index]
                tensor.fill_(step)
            model[1].num_batches_tracked += 1  # type: ignore[index]
        averaged.after_step(step, 100)


def test_the_average_is_judged_and_the_network_goes_on_from_its_own_weights() -> None:
    model = network()
    averaged = Averaged(model, 0.25)
    with averaged.judged():
        assert not model[0].weight.eq(0).any(), "nothing is averaged yet"
    drift(model, averaged, range(3))
    by_hand = 0.0
    for step in (1, 2):
        by_hand = by_hand + (1 - min(0.25, (1 + step) / (10 + step))) * (step - by_hand)
    with averaged.judged():
        for tensor in (*model.parameters(), model[1].running_mean):
            torch.testing.assert_close(tensor, torch.full_like(tensor, by_hand), check_dtype=True)
        assert model[1].num_batches_tracked == 3, "counts are no weights"
        averaged.state()["0.weight"].add_(0)
    assert model[0].weight.eq(2).all()
    with pytest.raises(KeyboardInterrupt), averaged.judged():
        raise KeyboardInterrupt
    assert model[1].running_mean.eq(2).all()


def test_what_a_checkpoint_holds_is_gone_on_from() -> None:
    whole, resumed = network(), network()
    averaged, first = Averaged(whole, 0.9), Averaged(resumed, 0.9)
    drift(whole, averaged, range(6))
    drift(resumed, first, range(3))
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    drift(resumed, first, range(3, 4))
    again = Averaged(resumed, 0.9)
    again.load(state)
    drift(resumed, again, range(3, 6))
    assert all(torch.equal(tensor, averaged.state()[name]) for name, tensor in again.state().items())
    again.load({})
    assert again.state() == {}
