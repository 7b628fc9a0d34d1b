"""Heads of attention: which kinds can lose some, which are kept and why, and that what is left is the best there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.profiling.statistics import gather
from distill.recipes import Changes, Kept, Thin, View
from distill.recipes.group import Group
from distill.recipes.heads import SelfAttention, open_attention, seen_heads
from distill.recipes.surgeon import regularized, repaired

X = torch.randn(6, 7, 24, generator=torch.Generator().manual_seed(0))


class Usual(nn.Module):
    """One layer for queries, keys and values, and a width that the code reads from its input."""

    order = (2, 0, 3, 1, 4)
    parts = (3, 4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, positions, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, positions, *self.parts).permute(self.order)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, positions, width))


class HeadsFirst(Usual):
    """The three of a head side by side."""

    order = (3, 0, 2, 1, 4)
    parts = (4, 3, 6)


class Apart(nn.Module):
    """A layer for each, and sizes left open."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(x.shape[0], -1, 4, 6).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Torch(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 4, **{"batch_first": True, **options})

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Masked(Torch):
    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False, attn_mask=torch.ones(7, 7).triu(1).bool())[0]


def of_timm(**options: Any) -> nn.Module:
    return timm.layers.Attention(24, 4, norm_layer=nn.LayerNorm, **options)


class Inside(nn.Module):
    """A block of attention and nothing else."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn = attention

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


def view_of(make: Callable[[], nn.Module]) -> tuple[View, nn.Module]:
    torch.manual_seed(0)
    block = Inside(make()).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    paths = frozenset(path for path, _ in block.named_modules())
    return View("block", block, X, (), paths, None), block


def proposed(make: Callable[[], nn.Module]) -> tuple[Changes | None, Kept]:
    return Thin(align=1).propose(view_of(make)[0])


NARROWED: dict[str, Callable[[], nn.Module]] = {
    "usual": Usual,
    "a layer each": Apart,
    "nn.MultiheadAttention": Torch,
    "without biases": lambda: Torch(bias=False),
    "positions first": lambda: Torch(batch_first=False),
    "timm": of_timm,
    "normalised heads": lambda: of_timm(qk_norm=True, qkv_bias=True),
    "gated": lambda: of_timm(gated=True),
}


@pytest.mark.parametrize("name", NARROWED)
class TestHeads:
    def test_half_of_them_cost_half(self, name: str) -> None:
        view, _ = view_of(NARROWED[name])
        changes, kept = Thin(align=1).propose(view)
        assert changes is not None, kept
        (group,) = map(Group.from_json, changes["groups"])
        assert (group.units, group.kept, group.step) == (4, 2, 6)
        assert 0.45 < Thin().cost(view, changes).params / view.cost.params < 0.55
        assert 0.45 < Thin().cost(view, changes).flops / view.cost.flops < 0.55
        assert Thin().unwatched(changes) == []

    def test_those_stay_that_the_output_needs_and_it_is_repaired(self, name: str) -> None:
        view, block = view_of(NARROWED[name])
        changes, _ = Thin(align=1).propose(view)
        assert changes is not None
        (path,) = Thin().wants(changes)
        with seen_heads(block):
            statistics = gather({path: block.get_submodule(path)}, [X], block)
        weight = block.get_submodule(path).weight.detach().double()
        covariance, errors = regularized(statistics[path].covariance), {}
        for one in range(4):
            for other in range(one):
                columns = (torch.tensor([other, one])[:, None] * 6 + torch.arange(6)).flatten()
                off = weight - repaired(weight, covariance, columns)
                errors[other, one] = float(((off @ covariance) * off).sum())
        student = Thin(align=1).student(view_of(NARROWED[name])[1], changes, torch.Generator(), statistics)
        lost = (student(X) - block(X)).detach()
        lost = lost - lost.mean((0, 1)) if block.get_submodule(path).bias is None else lost
        # One after another: not always the best pair.
        assert float(lost.square().sum(-1).mean()) < sorted(errors.values())[1] * 1.01

    def test_all_of_them_are_the_block_and_the_changes_alone_rebuild_the_student(self, name: str) -> None:
        view, block = view_of(NARROWED[name])
        changes, _ = Thin(align=1).propose(view)
        assert changes is not None
        full = {**changes, "groups": [{**group, "kept": group["units"]} for group in changes["groups"]]}
        torch.testing.assert_close(Thin().student(view_of(NARROWED[name])[1], full)(X), block(X))
        student = Thin(init="teacher").student(view_of(NARROWED[name])[1], changes, torch.Generator()).eval()
        again = Inside(NARROWED[name]()).eval()
        Thin().install(again, changes)
        again.load_state_dict(student.state_dict())
        assert torch.equal(again(X), student(X))
        assert all(again.get_submodule(path) for path in Thin().paths(changes))
        assert all(view.module.get_submodule(path) for path in Thin().paths(changes))


KEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "in another order": (HeadsFirst, "the block gives something else"),
    "with a mask": (Masked, "masks, or several tensors"),
    "more keys": (lambda: Torch(add_bias_kv=True), "its keys and values are of other widths, or more"),
    "normalised together": (lambda: of_timm(scale_norm=True), "its channels meet in a LayerNorm"),
}


@pytest.mark.parametrize("name", KEPT)
def test_other_kinds_are_kept_and_told(name: str) -> None:
    make, reason = KEPT[name]
    changes, kept = proposed(make)
    assert changes is None
    assert any(reason in one for one in kept.values()), kept


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"batch_first": False}, {"dropout": 0.2}], ids=str)
def test_attention_in_layers_is_the_same(options: dict[str, Any]) -> None:
    block = Torch(**options).eval()
    wanted, names = block(X), block.attention.out_proj
    with seen_heads(block):
        seen: list[Tensor] = []
        hook = names.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        torch.testing.assert_close(block(X), wanted)
        hook.remove()
    assert [one.shape[-1] for one in seen] == [24]
    torch.testing.assert_close(block(X), wanted)
    open_attention(block, ["attention"])
    assert isinstance(block.attention, SelfAttention)
    torch.testing.assert_close(block(X), wanted)
    block.train()(X).sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_code_that_is_given_more_than_one_argument_still_is() -> None:
    changes, _ = proposed(Usual)
    assert changes is not None
    block = Inside(Usual()).train()
    Thin().install(block, changes)
    assert block.attn(X, mask=None).shape == X.shape
    assert block.attn.training
