"""Factors computed as one kernel: the same function, the same gradients, and only where that is so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill.recipes import Separable
from distill.recipes.composed import composable, composed
from distill.recipes.factors import CHANNEL, SPATIAL, TUCKER, Factors
from distill.recipes.separable import SeparableConv2d

X = torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(0))
CONVOLUTIONS = [
    nn.Conv2d(6, 10, 3, padding=1),
    nn.Conv2d(6, 10, (3, 5), stride=2, padding=(1, 2), bias=False),
    nn.Conv2d(6, 10, 3, padding=(0, 2), dilation=(1, 2), stride=(2, 1)),
]


def replacements(conv: nn.Conv2d) -> list[nn.Module]:
    return [
        SeparableConv2d(conv, 1),
        SeparableConv2d(conv, 3),
        Factors(form=CHANNEL, ranks=(4,)).build(conv),
        Factors(form=SPATIAL, ranks=(4,)).build(conv),
        Factors(form=TUCKER, ranks=(3, 4)).build(conv),
    ]


@pytest.mark.parametrize("conv", CONVOLUTIONS)
@pytest.mark.parametrize("kind", range(5))
def test_one_kernel_is_the_same_function_with_the_same_gradients(conv: nn.Conv2d, kind: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(replacements(conv)[kind], nn.ReLU()).double()
    x = X.double().requires_grad_()
    layers = composable(network)
    assert layers == [network[0]]

    def passed() -> list[torch.Tensor]:
        outputs = network(x)
        return [outputs, *torch.autograd.grad(outputs.square().sum(), [x, *network.parameters()])]

    expected = passed()
    with composed(layers):
        inside = []
        handle = next(network[0].children()).register_forward_hook(lambda *_: inside.append(1))
        found = passed()
        handle.remove()
    assert not inside, "the factors do not run"
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert "forward" not in vars(network[0])
    torch.testing.assert_close(passed()[0], expected[0])


def test_what_is_heard_inside_stays_as_it_is_and_so_does_what_is_not_the_same() -> None:
    conv = nn.Conv2d(6, 10, 3, padding=1)
    network = nn.ModuleDict({"a": SeparableConv2d(conv, 2), "b": Factors(form=SPATIAL, ranks=(4,)).build(conv)})
    assert composable(network, ["a.depthwise"]) == [network["b"]]
    assert composable(network, ["a"]) == [*network.values()]
    reflected = nn.Conv2d(6, 10, 3, padding=1, padding_mode="reflect")
    named = nn.Conv2d(6, 10, 3, padding="same")
    biased = Factors(form=CHANNEL, ranks=(4,)).build(conv)
    biased.reduce = nn.Conv2d(6, 4, 3, padding=1)  # its bias would be seen at the border otherwise than inside
    linear = Factors(form=CHANNEL, ranks=(4,)).build(nn.Linear(6, 10))
    others = [Separable(rank=2).build(reflected), SeparableConv2d(named, 1), biased, linear, nn.Sequential(conv)]
    assert composable(nn.ModuleList(others)) == []
