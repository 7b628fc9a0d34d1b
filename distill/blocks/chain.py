"""What a network cut into blocks is: boundaries, blocks and the chain of them. Knows no way to cut one."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Boundary:
    """The form of one activation: `shape` with the batch dimension first, the strides in elements, the element type."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Boundary:
        """Return the form of `tensor`; one with holes or overlaps gets the dense strides of the same order."""
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        return cls(shape, stride if _is_dense(shape, stride) else _dense_strides(shape, stride), tensor.dtype)

    def of_rows(self, num_rows: int | None) -> Boundary:
        """Return the same form with so many rows; None: as many as it has."""
        return self if num_rows is None else replace(self, shape=(num_rows, *self.shape[1:]))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory and on the wire."""
        return self.numel * self.dtype.itemsize

    def strides_for(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the strides of a tensor of `shape` in this form; another batch size keeps the order of dimensions."""
        return self.stride if shape == self.shape else _dense_strides(shape, self.stride)

    def conform(self, tensor: Tensor) -> Tensor:
        """Return `tensor` itself if it is in this form, otherwise a copy that is; the batch size is free."""
        shape = tuple(tensor.shape)
        strides = self.strides_for(shape)
        if tuple(tensor.stride()) == strides:
            return tensor
        return torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@dataclass(frozen=True)
class Block:
    """Facts about one block: its place, its name and the qualified paths of what is in it."""

    index: int
    name: str
    convolutions: tuple[str, ...]  # every nn.Conv2d, in the order of use
    modules: tuple[str, ...]  # every module with parameters of its own, in the order of use


class Chain(ABC):
    """A frozen network as a sequence of blocks: block k turns boundary k into boundary k + 1.

    All tensors are shared with the network that was cut, so move that to its device first; the module tree is a copy,
    with in-place operations switched off.
    """

    blocks: tuple[Block, ...]
    boundaries: tuple[Boundary, ...]  # one more than blocks
    first_convolution: str | None  # the path of the nn.Conv2d that the network runs first, in a block or not
    remark: str | None = None  # what stood against cutting the network finer, where that is worth telling

    @abstractmethod
    def run(self, x: Tensor, *, last: int, keep: Collection[int], first: int = 0) -> dict[int, Tensor]:
        """Return the boundaries `keep`, all in `first` .. `last`, for boundary `first` = `x` (B, ...; 0 is the
        network's input); runs no block before or behind them.

        No gradients. Each is in the recorded form of its boundary, for any batch size B, and never changes afterwards.
        Raises NotImplementedError for `first` > 0 where the chain is not `divisible`.
        """

    @property
    @abstractmethod
    def divisible(self) -> bool:
        """Whether every block can run alone, so that the teacher can be spread over ranks."""

    @abstractmethod
    def run_block(self, index: int, x: Tensor) -> Tensor:
        """Return the teacher's boundary index + 1 for its boundary `index`, without gradients."""

    def run_blocks(self, x: Tensor, *, last: int, keep: Collection[int], first: int) -> dict[int, Tensor]:
        """run() of a chain that is `divisible`: block by block."""
        kept = {}
        x = self.boundaries[first].conform(x)
        for boundary in range(first, last + 1):
            if boundary > first:
                x = self.run_block(boundary - 1, x)
            if boundary in keep:
                kept[boundary] = x
        return kept

    def counted(self, x: Tensor, counter: Callable[[], float]) -> Iterator[tuple[float, Tensor]]:
        """Yield for every block in order by how much `counter` (a clock, a count of operations) rises while the teacher
        computes it, and its output, for the network's input `x`. Between two of them the caller may do other work."""
        for index in range(len(self.blocks)):
            before = counter()
            x = self.run_block(index, x)
            yield counter() - before, x

    def run_with(self, students: Mapping[int, nn.Module], x: Tensor) -> Tensor:
        """Return the network's output for its input `x` with `students` in the place of the blocks of those indices."""
        for index in range(len(self.blocks)):
            x = students[index](x) if index in students else self.run_block(index, x)
        return x

    @abstractmethod
    def block_module(self, index: int) -> nn.Module:
        """Return a trainable copy of a block, in training mode: one tensor in, one out.

        The names of its modules and weights are the teacher's own qualified names. What the network's code, as opposed
        to a module, decides by `self.training` (stochastic depth, functional dropout) stays as in evaluation.
        """


def share_tensors(model: nn.Module) -> nn.Module:
    """Return a copy of the module tree whose parameters and buffers are the very tensors of `model`."""
    return _copied(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a network with tensors of its own."""
    return _copied(model, {})


def _copied(model: nn.Module, known: dict[int, Any]) -> nn.Module:
    """deepcopy() also where a pass has left results in a module, such as the kernel of torch.nn.utils.weight_norm()."""
    for module in model.modules():
        results = [one for one in vars(module).values() if isinstance(one, Tensor) and one.grad_fn is not None]
        known |= {id(one): one.detach().clone() for one in results}
    return copy.deepcopy(model, known)


def switch_off_in_place(root: nn.Module) -> None:
    """Make every layer of `root` that can work in place, such as nn.ReLU, return a new tensor instead."""
    for module in root.modules():
        if isinstance(getattr(module, "inplace", None), bool):
            module.inplace = False  # type: ignore[assignment]


def agree(traced: object, original: Tensor) -> bool:
    """Return whether a rewritten network gives the result of the original, kernels' last bits aside."""
    if not isinstance(traced, Tensor) or traced.shape != original.shape:
        return False
    if original.device.type == "meta" or original.numel() == 0:
        return True
    # Only a misread program is looked for, so kernels that differ in the last bits may pass.
    scale = float(original.abs().nan_to_num(0.0).max())
    return torch.allclose(traced, original, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)


def made_trainable(module: nn.Module) -> nn.Module:
    """Return `module` itself, in training mode and with gradients for every floating-point parameter."""
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return module.train()


def parameter_owners(module: nn.Module, path: str) -> list[str]:
    """Return the paths of `module` and the modules in it that own parameters."""
    inside = [(name, one) for name, one in module.named_modules() if any(True for _ in one.parameters(recurse=False))]
    return [f"{path}.{name}" if name else path for name, _ in inside]


def _outermost_first(stride: tuple[int, ...]) -> list[int]:
    return sorted(range(len(stride)), key=lambda dim: -stride[dim])


def _dense_strides(shape: tuple[int, ...], order: tuple[int, ...]) -> tuple[int, ...]:
    """Strides without holes for `shape`, its dimensions nested as those with the strides `order` are."""
    strides = [0] * len(shape)
    step = 1
    for dim in reversed(_outermost_first(order)):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """True if the elements fill a piece of memory, each place once (strides of dimensions of size one are free)."""
    step = 1
    for dim in sorted((dim for dim in range(len(shape)) if shape[dim] != 1), key=lambda dim: stride[dim]):
        if stride[dim] != step:
            return False
        step *= shape[dim]
    return True
