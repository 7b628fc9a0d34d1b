"""Cutting traceable networks inside their units, where a skip connection passes the listed modules by."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from distill.blocks.cut import Chain, Granularity, HookedChain, TracedChain, cut
from distill.errors import ConfigError
from distill.planning.costs import Costs, Span
from distill.planning.placement.plans import plan_broadcast
from distill.planning.unit import Unit, boundaries_of
from distill.profiling.block_costs import Students, count_flops, flop_costs, measured_costs
from distill.recipes import SeparableX2, replace_convolutions
from distill.teachers import build_architecture
from distill.training.optim import TrainerOptions
from distill.training.trainer import BlockTrainer

UNITS = {"cifar_resnet20": 9, "resnet18": 8, "resnet50": 16}
PATTERN = ["layer*.*.conv2"]


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    source = "cifar" if name.startswith("cifar") else "torchvision"
    built = build_architecture(source=source, name=name, num_classes=10)
    return built.to(memory_format=torch.channels_last)


def images(batch: int = 2, size: int = 32) -> Tensor:
    drawn = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    return drawn.to(memory_format=torch.channels_last)


def conv2_paths(model: nn.Module) -> list[str]:
    return [path for path, _ in model.named_modules() if path.endswith("conv2")]


def plainly_heard(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of every conv2, by ordinary hooks on the network itself; copies."""
    heard = {}
    with torch.no_grad():
        for path in conv2_paths(model):
            model.get_submodule(path).register_forward_hook(
                lambda _, args, result, path=path: heard.update({path: (args[0].clone(), result.clone())})
            )
        model(x)
    return heard


@pytest.fixture(scope="module", params=sorted(UNITS))
def case(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Chain]:
    model = network(request.param)
    return request.param, model, cut(model, images(), granularity=Granularity.modules, modules=PATTERN)


@pytest.fixture(scope="module")
def chain() -> Chain:
    return cut(network("cifar_resnet20"), images(), granularity=Granularity.modules, modules=PATTERN)


def test_every_listed_convolution_is_a_block_and_the_rest_lies_between(case: tuple[str, nn.Module, Chain]) -> None:
    name, model, chain = case
    listed = conv2_paths(model)
    assert isinstance(chain, HookedChain)
    assert len(listed) == UNITS[name]
    assert [block.name for block in chain.blocks if block.convolutions] == listed
    between = [block for block in chain.blocks if not block.convolutions]
    assert [block.name for block in between] == [*(f"before {path}" for path in listed), f"after {listed[-1]}"]
    assert all(block.convolutions == (block.name,) for block in chain.blocks if block not in between)


def test_boundaries_are_bitwise_what_plain_hooks_hear(case: tuple[str, nn.Module, Chain]) -> None:
    _, model, chain = case
    x = images(batch=3)  # the chain was cut with two
    kept = chain.run(x, last=len(chain.blocks), keep=range(len(chain.blocks) + 1))
    heard = plainly_heard(model, x)
    assert heard
    for block in chain.blocks:
        if block.convolutions:
            assert torch.equal(kept[block.index], heard[block.name][0])
            assert torch.equal(kept[block.index + 1], heard[block.name][1])
            assert torch.equal(chain.run_block(block.index, kept[block.index]), kept[block.index + 1])
    with torch.no_grad():
        assert torch.equal(kept[len(chain.blocks)], model(x))


def test_a_run_ends_at_the_deepest_boundary_and_keeps_only_what_is_wanted(chain: Chain) -> None:
    assert isinstance(chain, HookedChain)
    ran: list[str] = []
    for path, module in chain._root.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, path=path: ran.append(path))
    assert list(chain.run(images(), last=4, keep=[3, 4])) == [3, 4]
    assert ran == ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"]


def test_the_first_convolution_is_the_networks_also_where_no_block_holds_it(chain: Chain) -> None:
    assert chain.first_convolution == "conv1"
    assert cut(network("cifar_resnet20"), images(), granularity=Granularity.residual).first_convolution == "conv1"


def test_modules_at_cut_points_are_still_cut_by_the_trace() -> None:
    traced = cut(network("cifar_resnet20"), images(), granularity=Granularity.modules, modules=["layer*.*"])
    assert isinstance(traced, TracedChain)
    assert sum(bool(block.convolutions) for block in traced.blocks) == 1 + UNITS["cifar_resnet20"]


class _Tied(nn.Module):
    """Uses one kernel twice, with skips, so that no use of it is a cut point."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 1) for _ in range(3))
        self.third.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        x = x + self.second(x)
        return x + self.third(x)


def test_a_module_that_shares_weights_is_refused_and_its_neighbour_is_not() -> None:
    hooked = cut(_Tied(), images(size=4), granularity=Granularity.modules, modules=["second"])
    assert [block.convolutions for block in hooked.blocks] == [(), ("second",), ()]
    with pytest.raises(ConfigError, match=r"'first'.*shared with third\.weight"):
        cut(_Tied(), images(size=4), granularity=Granularity.modules, modules=["first"])


def students_of(chain: Chain) -> Students:
    return {
        Unit.of_block(block.index, block.name): partial(trainer_of, chain, block.index)
        for block in chain.blocks
        if block.convolutions
    }


def trainer_of(chain: Chain, index: int) -> BlockTrainer:
    block = chain.blocks[index]
    module = chain.block_module(index)
    generator = torch.Generator().manual_seed(index)
    replace_convolutions(module, block.convolutions, SeparableX2(rank=1, init="random"), generator)
    module.to(memory_format=torch.channels_last)
    options = TrainerOptions(optimizer="rmsprop", loss="mse", schedule="constant")
    return BlockTrainer(
        Unit.of_block(index, block.name), module, budget=10, device=torch.device("cpu"), options=options
    )


def test_flops_of_blocks_and_of_what_lies_between_add_up_to_the_network(chain: Chain) -> None:
    x = images()
    found = flop_costs(chain, students_of(chain), x)
    assert sum(found.teacher) == count_flops(lambda: chain.run(x, last=len(chain.blocks), keep=()))
    assert [cost > 0 for cost in found.student] == [bool(block.convolutions) for block in chain.blocks]
    assert all(cost > 0 for cost in found.teacher)


def test_every_block_has_a_measured_price_and_the_plan_trains_each_student_once(chain: Chain) -> None:
    found = measured_costs(chain, students_of(chain), images(), steps=1)
    assert all(cost > 0 for cost in found.teacher)
    assert [cost > 0 for cost in found.student] == [bool(block.convolutions) for block in chain.blocks]
    students = [block.index for block in chain.blocks if block.convolutions]
    costs = Costs(found.teacher, found.student, tuple(boundary.nbytes for boundary in chain.boundaries))
    plan = plan_broadcast(costs, [Span(index, 0, 10) for index in students], 2)
    assert sorted(block for owned in plan.owners for block in owned) == students
    # The gaps before the deepest student are the teacher's work, the one behind it is nobody's.
    assert plan.predicted_rank_s[0] >= 10 * sum(found.teacher[:-1])
    assert boundaries_of(plan.spans) == set(range(1, len(chain.blocks)))
