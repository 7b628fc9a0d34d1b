"""A teacher in bf16: close to the exact one, its boundaries bf16, and the same bits however it is spread."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distill.blocks.bf16 import Bf16Chain
from distill.blocks.cut import Chain, Granularity, cut
from distill.teachers import build_architecture


class Normed(nn.Module):
    """Its layer norm leaves float32 under autocast, which a boundary must not pass on where it is not cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 3), nn.LayerNorm([8, 6, 6]), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)))  # type: ignore[no-any-return]


def images(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, size, size, generator=generator).to(memory_format=torch.channels_last)


@pytest.fixture(scope="module", params=["resnet", "normed", "hooked"])
def case(request: pytest.FixtureRequest) -> tuple[Chain, Chain, Tensor]:
    torch.manual_seed(0)
    if request.param == "normed":
        exact = cut(Normed(), images(8), granularity=Granularity.modules, modules=["first", "norm", "second"])
        return exact, Bf16Chain(exact), images(8)
    network = build_architecture(source="cifar", name="cifar_resnet20", num_classes=10)
    network.to(memory_format=torch.channels_last)
    hooked = request.param == "hooked"
    exact = cut(
        network,
        images(32),
        granularity=Granularity.modules if hooked else Granularity.residual,
        modules=["layer1.0.conv1", "layer2.0.conv2"] if hooked else [],
    )
    assert exact.divisible != hooked
    return exact, Bf16Chain(exact), images(32)


def everything(chain: Chain, x: Tensor) -> dict[int, Tensor]:
    return chain.run(x, last=len(chain.blocks), keep=range(len(chain.blocks) + 1))


def test_boundaries_are_bf16_and_close_to_the_exact_ones(case: tuple[Chain, Chain, Tensor]) -> None:
    exact, rounded, x = case
    expected, found = everything(exact, x), everything(rounded, x)
    for boundary, form in enumerate(rounded.boundaries):
        assert found[boundary].dtype == form.dtype == torch.bfloat16
        assert found[boundary].stride() == form.strides_for(tuple(found[boundary].shape))
        scale = float(expected[boundary].abs().max())
        torch.testing.assert_close(found[boundary].float(), expected[boundary], rtol=0.0, atol=0.03 * scale)
        assert form.nbytes * 2 == exact.boundaries[boundary].nbytes


def test_whoever_computes_a_boundary_gets_the_same_bits(case: tuple[Chain, Chain, Tensor]) -> None:
    _, chain, x = case
    found, last = everything(chain, x), len(chain.blocks)
    assert all(torch.equal(chain.run(x, last=k, keep=(k,))[k], found[k]) for k in range(1, last + 1))
    if chain.divisible:
        for first in range(1, last):
            there = chain.run(found[first].float(), first=first, last=last, keep=(last,))
            assert torch.equal(there[last], found[last]), first


def test_costs_are_counted_for_every_block(case: tuple[Chain, Chain, Tensor]) -> None:
    _, chain, x = case
    counted = list(chain.counted(x, lambda: 0.0))
    assert len(counted) == len(chain.blocks)
    assert all(output.dtype == torch.bfloat16 for _, output in counted)
    assert not torch.is_autocast_enabled("cpu")


def test_students_stay_float32(case: tuple[Chain, Chain, Tensor]) -> None:
    exact, chain, _ = case
    block = next(block.index for block in chain.blocks if block.convolutions)
    assert {p.dtype for p in chain.block_module(block).parameters()} == {torch.float32}
    assert chain.blocks is exact.blocks
