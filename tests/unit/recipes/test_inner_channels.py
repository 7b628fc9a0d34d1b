"""Groups of channels inside blocks, found in graphs: of operations one by one, and of networks of every family."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.blocks.tracing import UntraceableError
from distill.recipes.channels import Part, follow, inner_groups
from distill.recipes.group import Group, Site, others, take_away

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
Body = Callable[["Block", Tensor], Tensor]


class Block(nn.Module):
    """A dense convolution from 4 to 12 channels, something, and one back to 4."""

    def __init__(self, between: Body, **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Conv2d(4, 12, 3, padding=1), nn.Conv2d(12, 4, 1)
        self.between = between
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))


def found(block: nn.Module, x: Tensor = X) -> tuple[list[Group], dict[str, str]]:
    return inner_groups(block.eval(), x)


def paths(sites: tuple[Site, ...]) -> list[str]:
    return [site.path for site in sites]


def squeeze_excite(self: Block, x: Tensor) -> Tensor:
    return x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


GATE = {"down": nn.Conv2d(12, 5, 1), "up": nn.Conv2d(5, 12, 1)}
PASSED: dict[str, Block] = {
    "nothing": Block(lambda self, x: x),
    "batch norm": Block(lambda self, x: self.norm(x).relu(), norm=nn.BatchNorm2d(12)),
    "depthwise": Block(lambda self, x: self.deep(x), deep=nn.Conv2d(12, 12, 3, padding=1, groups=12)),
    "PReLU": Block(lambda self, x: self.act(x), act=nn.PReLU(12)),
    "one PReLU": Block(lambda self, x: self.act(x), act=nn.PReLU()),
    "pooling": Block(lambda self, x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2.0)),
    "itself": Block(lambda self, x: F.silu(x) + 2 * x),
    "gate": Block(squeeze_excite, **GATE),
    "channels last and back": Block(lambda self, x: F.gelu(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
    "a size": Block(lambda self, x: x / x.size(2)),
}


@pytest.mark.parametrize("block", PASSED.values(), ids=PASSED.keys())
def test_channels_pass(block: Block) -> None:
    (group, *_), kept = found(block)
    assert (group.units, paths(group.producers)[0], paths(group.consumers)) == (12, "first", ["last"])
    assert kept == {}


STOPPED: dict[str, tuple[Block, str]] = {
    "layer norm": (Block(lambda self, x: self.norm(x), norm=nn.LayerNorm([12, 6, 6])), "meet in a LayerNorm"),
    "group norm": (Block(lambda self, x: self.norm(x), norm=nn.GroupNorm(3, 12)), "meet in a GroupNorm"),
    "softmax": (Block(lambda self, x: x.softmax(1)), r"meet in softmax\(\)"),
    "shuffle": (Block(lambda self, x: x.view(2, 3, 4, 6, 6).transpose(1, 2).reshape(2, 12, 6, 6)), r"view\(\)"),
    "split": (Block(lambda self, x: x + torch.cat(x.split(6, 1)[::-1], 1)), r"meet in split\(\)"),
    "a second input": (
        Block(lambda self, x: x * self.near(torch.ones(2, 12, 6, 6), x)[:, None], near=nn.CosineSimilarity()),
        "meet others in a CosineSimilarity",
    ),
    "mean over channels": (Block(lambda self, x: x * x.mean(1, keepdim=True)), r"meet in mean\(\)"),
    "a weight": (Block(lambda self, x: x * self.first.bias.view(1, 12, 1, 1)), "a weight of it is used more than once"),
    "twice": (Block(lambda self, x: x + self.same(self.same(x)), same=nn.Conv2d(12, 12, 1)), "used more than once"),
    "other places": (
        Block(lambda self, x: (y := F.interpolate(x, 12)) + y.transpose(1, 2)),
        "something else than channels",
    ),
    "mixed channels and places": (Block(lambda self, x: self.odd(x), odd=nn.Linear(6, 6)), "something else"),
}


@pytest.mark.parametrize(("block", "reason"), STOPPED.values(), ids=STOPPED.keys())
def test_what_is_not_understood_keeps_channels_with_a_reason(block: Block, reason: str) -> None:
    groups, kept = found(block)
    assert not [group for group in groups if "first" in group.paths]
    assert kept["first"]
    assert re.search(reason, kept["first"])


def test_a_gate_is_told_from_what_reads_the_channels() -> None:
    outer, inner = found(PASSED["gate"])[0]
    assert (paths(outer.producers), paths(outer.consumers), paths(outer.gates)) == (["first", "up"], ["last"], ["down"])
    assert (paths(inner.producers), paths(inner.consumers), inner.units) == (["down"], ["up"], 5)


def test_convolutions_in_groups_go_group_by_group() -> None:
    block = Block(
        lambda self, x: self.norm(self.grouped(x)), grouped=nn.Conv2d(12, 12, 1, groups=3), norm=nn.BatchNorm2d(12)
    )
    (group,), _ = found(block)
    assert (group.units, group.step) == (3, 4)
    assert [(site.path, site.each) for site in group.outputs] == [("first", 4), ("grouped", 4), ("norm", 4)]


def test_concatenated_runs_have_places_of_their_own() -> None:
    block = Block(lambda self, x: torch.cat([self.a(x), x, self.b(x)], 1), a=nn.Conv2d(12, 3, 1), b=nn.Conv2d(12, 5, 1))
    block.last = nn.Conv2d(20, 4, 1)
    groups, _ = found(block)
    starts = {
        group.producers[0].path: [site.start for site in group.consumers if site.path == "last"] for group in groups
    }
    assert starts == {"first": [3], "a": [0], "b": [15]}


def test_flattened_channels_are_as_many_inputs_as_places() -> None:
    block = nn.Sequential(nn.Conv2d(4, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 16, 7))
    (group,), _ = found(block)
    assert group.consumers == (Site("3", 0, 16),)


def test_the_block_s_own_channels_are_no_group_and_no_news() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.one(x)
            return x + self.two(x)

    assert found(Residual()) == ([], {})


def test_a_block_without_a_graph_is_refused() -> None:
    class Deciding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(UntraceableError):
        found(Deciding())


def test_groups_are_json() -> None:
    (group, _), _ = found(PASSED["gate"])
    assert Group.from_json(group.as_json()) == group


@pytest.mark.parametrize("block", PASSED.values(), ids=PASSED.keys())
def test_units_that_nothing_reads_can_be_taken_away(block: Block) -> None:
    block = deepcopy(block).eval()
    groups = found(block)[0][:1]
    away = torch.tensor([0, 5, 6])
    with torch.no_grad():
        for site in groups[0].inputs:
            block.get_submodule(site.path).weight[:, site.channels(away).flatten()] = 0.0
        wanted = block(X)
        take_away(block, groups, [others(12, away)])
        assert block.first.out_channels == block.last.in_channels == 9
        torch.testing.assert_close(block(X), wanted)


def test_an_addition_to_a_concatenation_parts_a_layer_s_channels() -> None:
    block = Block(
        lambda self, x: x + torch.cat([self.a(x), self.b(x)], 1), a=nn.Conv2d(12, 4, 1), b=nn.Conv2d(12, 8, 1)
    )
    one, other = found(block)[0]
    assert [(group.units, paths(group.producers)) for group in (one, other)] == [
        (4, ["first", "a"]),
        (8, ["first", "b"]),
    ]
    assert [site.start for site in (*one.consumers, *other.consumers)] == [0, 0, 0, 4, 4, 4]


def test_zeros_around_an_image_are_nothing_and_zeros_as_channels_stay() -> None:
    assert found(Block(lambda self, x: F.pad(x, (1, 1, 0, 0))))[0][0].units == 12
    block = Block(lambda self, x: self.wide(x) + F.pad(x[:, :, :, :], (0, 0, 0, 0, 1, 2)), wide=nn.Conv2d(12, 15, 1))
    block.last = nn.Conv2d(15, 4, 1)
    (group,), kept = found(block)
    assert (group.units, paths(group.producers)) == (12, ["first", "wide"])
    assert [(site.path, site.start) for site in group.consumers] == [("wide", 0), ("last", 1)]
    assert "zeros" in kept["wide"]


def test_channels_are_followed_from_one_block_to_the_next() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near = nn.Conv2d(12, 12, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.near(x)

    ends = (nn.Sequential(OrderedDict({name: nn.Conv2d(*c, 1)})) for name, c in (("first", (4, 12)), ("last", (12, 4))))
    first, last = ends
    followed = follow([block.eval() for block in (first, Residual(), last)], X)
    (group,) = followed.groups
    assert (paths(group.producers), paths(group.consumers)) == (["first", "near"], ["near", "last"])
    assert followed.boundaries == [(Part(0, 12, 1),)] * 2
    assert followed.crossing == {"first", "near"}
    assert followed.kept == {}
