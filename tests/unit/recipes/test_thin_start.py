"""First weights where groups of channels meet: at one layer as its inputs, or as its inputs and outputs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from distill.profiling.statistics import InputStatistics, gather
from distill.recipes.channels import inner_groups
from distill.recipes.group import Group, others
from distill.recipes.surgeon import Reader, regularized, remaining, repaired
from distill.recipes.thin_start import choose

X = torch.randn(40, 3, 5, 5, generator=torch.Generator().manual_seed(0))


class Joined(nn.Module):
    """Two groups that one layer reads, and one that it makes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.reads = nn.Conv2d(3 + 6 + 4, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.reads(torch.cat([x, self.a(x).relu(), self.b(x).sigmoid()], 1)).relu())


def halved(block: nn.Module) -> tuple[list[Group], dict[str, InputStatistics]]:
    groups = [replace(group, kept=group.units // 2) for group in inner_groups(block.eval(), X)[0]]
    layers = {site.path: block.get_submodule(site.path) for group in groups for site in group.consumers}
    return groups, gather(layers, [X], block)


def test_a_reader_of_two_groups_ends_with_the_best_weights_for_what_is_left() -> None:
    block, teacher = Joined(), Joined()
    groups, seen = halved(block)
    kept = dict(zip(("a", "b", "reads"), choose(block, groups, seen), strict=True))
    channels = torch.cat([torch.arange(3), 3 + kept["a"], 9 + kept["b"]])
    columns = (channels[:, None] * 9 + torch.arange(9)).flatten()
    kernel = teacher.reads.weight.detach().double().flatten(1)
    best = repaired(kernel, regularized(seen["reads"].covariance), columns)
    torch.testing.assert_close(block.reads.weight.detach().flatten(1), best.float())
    bias = teacher.reads.bias.detach() + ((kernel - best) @ seen["reads"].mean).float()
    torch.testing.assert_close(block.reads.bias.detach(), bias)


def test_what_a_layer_will_not_put_out_does_not_decide_its_inputs() -> None:
    block, teacher = Joined(), Joined()
    groups, seen = halved(block)
    kept = dict(zip(("a", "b", "reads"), choose(block, groups, seen), strict=True))
    kernel = teacher.reads.weight.detach().double().flatten(1)
    kernel[others(8, kept["reads"])] = 0.0
    reads = (9 + torch.arange(4))[:, None] * 9 + torch.arange(9)
    rest = others(13 * 9, reads.flatten())
    reader = Reader(kernel, regularized(seen["reads"].covariance), reads, rest)
    assert remaining([reader], 4, 2).tolist() == kept["b"].tolist()


def test_one_consumer_without_statistics_leaves_its_group_to_the_norms() -> None:
    block, teacher = Joined(), Joined()
    groups, seen = halved(block)
    choose(block, groups, {"last": seen["last"]})
    assert torch.equal(block.reads.weight, teacher.reads.weight)
    assert not torch.equal(block.last.weight, teacher.last.weight)
