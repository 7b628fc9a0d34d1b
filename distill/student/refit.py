"""Fitting the linear layers of student blocks to the inputs that they really get, in closed form and from the first
block to the last: it makes good, as far as linear layers can, what the students before have lost.

A layer that ends the replacement of a teacher's layer is to give what that gives; the last layer of a block, what is
missing from the teacher's output before its last activation, beside what reaches the student's past that layer (a
shortcut). The weights are those of ridge regression on the layer's unfolded inputs in the student, drawn towards those
that it has. Source: He, Zhang, Sun 2017, "Channel pruning for accelerating very deep neural
networks", section 3.2, where inputs are the pruned network's and targets the original's (arXiv:1707.06168).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from distill.blocks.chain import Chain
from distill.profiling.statistics import WIDEST, rows_of
from distill.recipes.least_squares import matrix, scale_of
from distill.recipes.segments import segmented

RIDGE = 1e-3  # of the features' mean variance
TOLERANCE = 1e-4  # relative: to that the layer must enter the output as a sum
FEW = 4  # images that show how a block runs

Narrowed = Callable[[Tensor], Tensor]  # what the output of a student's block is of the teacher's
Pair = tuple[Tensor, Tensor]  # of the same images: what the teacher's block gets, and what the student's

# What a block may end with that a least-squares target lies before; each is given its input first.
ACTIVATIONS = (
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.hardtanh, F.hardswish, F.silu, F.gelu, F.elu, F.mish,
    torch.relu, torch.relu_, segmented,
)  # fmt: skip


class _BeforeActivation(TorchFunctionMode):
    """Remembers the input of the activation that gave a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.last: tuple[Tensor, Tensor] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in ACTIVATIONS:
            return func(*args, **(kwargs or {}))
        before = args[0].clone()  # it may work in place
        result = func(*args, **(kwargs or {}))
        self.last = (before, result)
        return result


def before_activation(block: nn.Module, x: Tensor) -> Tensor:
    """Return what a block's last activation gets for `x`; its output, where it does not end in one."""
    with _BeforeActivation() as mode:
        y = block(x)
    result: Tensor = mode.last[0] if mode.last is not None and mode.last[1] is y else y
    return result


@dataclass(frozen=True)
class Site:
    """A linear layer of a student block and the batch norm behind it, if any. What they give is to be what the
    teacher's module `twin` gives; without one, they enter the block's output as a sum."""

    layer: nn.Conv2d | nn.Linear
    norm: _BatchNorm | None
    twin: nn.Module | None = None

    @property
    def end(self) -> nn.Module:
        return self.layer if self.norm is None else self.norm


def _whole(y: Tensor) -> Tensor:
    return y


@torch.no_grad()
def refit_block(
    student: nn.Module, teacher: nn.Module, inputs: Sequence[Pair], paths: Sequence[str], gives: Narrowed = _whole
) -> int:
    """Fit what can be fitted of a student block, in place and in the order in which it runs; return how many layers.

    `paths` are those of the modules that the student has in the place of the teacher's. Both are in eval mode.
    """
    sites = _sites(student, teacher, inputs[0], paths)
    for site in sites:
        moments = _Moments()
        for turn, (theirs, own) in enumerate(inputs):
            moments.add(*_rows(site, student, teacher, theirs, own, turn=turn, gives=gives))
        _solve(site, moments)
    return len(sites)


def _sites(student: nn.Module, teacher: nn.Module, pair: Pair, paths: Sequence[str]) -> list[Site]:
    theirs, own = pair[0][:FEW], pair[1][:FEW]
    mine, wanted = _Watched.of(student, own), _Watched.of(teacher, theirs)
    sites = []
    for path in paths:
        part, twin = student.get_submodule(path), _submodule(teacher, path)
        layer = mine.ending(part)
        if layer is None or _is_wide(layer):
            continue
        if not isinstance(twin, nn.Conv2d | nn.Linear) or twin not in wanted.outputs:
            continue
        if mine.outputs[layer].shape == wanted.outputs[twin].shape:
            sites.append(Site(layer, mine.behind.get(layer), wanted.behind.get(twin, twin)))
    replaced = {module for path in paths for module in student.get_submodule(path).modules()}
    twins = {site.layer for site in sites}
    ends = True  # the last of these layers is fitted to the block's output, even where it has a twin
    for layer in reversed(mine.order):
        own_site = Site(layer, mine.behind.get(layer))
        if layer not in replaced or not (ends or layer not in twins) or not _is_fitted(layer, mine):
            continue
        if _enters_as_a_sum(student, own, own_site):
            sites = [*(site for site in sites if site.layer is not layer), own_site]
            ends = False
    return sorted(sites, key=lambda site: mine.order.index(site.layer))


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _is_fitted(layer: nn.Module, watched: _Watched) -> bool:
    dense = isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    return dense and not _is_wide(layer) and sum(other is layer for other in watched.order) == 1


def _is_wide(layer: nn.Module) -> bool:
    """Whether a layer has more inputs than images could say anything about, in products that have no room."""
    return layer.weight[0].numel() > WIDEST  # type: ignore[index]


@dataclass
class _Watched:
    """What the modules of a block have done in one pass: the linear layers in their order, every module's output, and
    the batch norms that read just what a layer gives."""

    order: list[nn.Conv2d | nn.Linear] = field(default_factory=list)
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    behind: dict[nn.Module, _BatchNorm] = field(default_factory=dict)

    @classmethod
    def of(cls, block: nn.Module, x: Tensor) -> _Watched:
        found = cls()
        hooks = [module.register_forward_hook(found._ended) for module in block.modules() if module is not block]
        try:
            block(x)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _ended(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            self.order.append(module)
        self.outputs[module] = output
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.affine:
            self.behind |= {layer: module for layer in self.order if self.outputs[layer] is inputs[0]}

    def ending(self, part: nn.Module) -> nn.Conv2d | nn.Linear | None:
        """Return the layer whose output is that of `part`, if it can be fitted."""
        for layer in self.order:
            if layer in part.modules() and self.outputs[layer] is self.outputs.get(part) and _is_fitted(layer, self):
                return layer
        return None


def _enters_as_a_sum(block: nn.Module, x: Tensor, site: Site) -> bool:
    whole = before_activation(block, x)
    with _silenced(site) as heard:
        rest = before_activation(block, x)
    if heard.output.shape != whole.shape:
        return False
    return bool((rest + heard.output - whole).norm() <= TOLERANCE * whole.norm())


@dataclass
class _Heard:
    features: Tensor = field(default_factory=lambda: torch.empty(0))
    output: Tensor = field(default_factory=lambda: torch.empty(0))


@contextmanager
def _silenced(site: Site) -> Iterator[_Heard]:
    """Let others take a site's output for zeros; what it gets and what it would have given is heard."""
    heard = _Heard()

    def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heard.features = inputs[0]

    def leave(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        heard.output = output
        return torch.zeros_like(output)

    hooks = [site.layer.register_forward_pre_hook(enter), site.end.register_forward_hook(leave)]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _rows(
    site: Site, student: nn.Module, teacher: nn.Module, theirs: Tensor, own: Tensor, *, turn: int, gives: Narrowed
) -> tuple[Tensor, Tensor]:
    """Return rows of what a site gets (n, d) and of what it should give (n, D)."""
    with _silenced(site) as heard:
        rest = before_activation(student, own)
    if site.twin is None:
        targets = gives(before_activation(teacher, theirs)) - rest
    else:
        targets = _Watched.of(teacher, theirs).outputs[site.twin]
    rows, pick = rows_of(site.layer, heard.features, turn=turn)
    return rows, pick(targets)


class _Moments:
    """Sums over rows of features (n, d) and targets (n, D), in float64."""

    def __init__(self) -> None:
        self.rows = 0
        self.sums: list[Tensor] = []

    def add(self, features: Tensor, targets: Tensor) -> None:
        features, targets = features.float(), targets.float()
        new = [features.double().sum(0), targets.double().sum(0), (features.T @ features).double()]
        new.append((targets.T @ features).double())
        self.sums = [old + more for old, more in zip(self.sums, new, strict=True)] if self.sums else new
        self.rows += len(features)

    def means(self) -> list[Tensor]:
        return [(total / self.rows).cpu() for total in self.sums]


def _solve(site: Site, moments: _Moments) -> None:
    """Set the weights by ridge regression towards what they are, and the mean by the batch norm or the bias."""
    layer, norm = site.layer, site.norm
    mean_f, mean_t, second, cross = moments.means()
    if norm is not None or layer.bias is not None:  # else the mean is the weights' to give
        second, cross = second - torch.outer(mean_f, mean_f), cross - torch.outer(mean_t, mean_f)
    scale = torch.ones(len(mean_t), dtype=torch.float64) if norm is None else scale_of(norm)
    before = scale[:, None] * matrix(layer.weight)
    damped = second.clone()
    damped.diagonal().add_(RIDGE * second.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny))
    after = before + torch.linalg.solve(damped, (cross - before @ second).T).T
    weight = after / scale[:, None]
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    if norm is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        variance = ((weight @ second) * weight).sum(1).clamp_min(0)
        norm.running_mean.copy_(weight @ mean_f + (0 if layer.bias is None else layer.bias.cpu().double()))
        norm.running_var.copy_(variance)
        norm.weight.copy_(scale * (variance + norm.eps).sqrt())
        norm.bias.copy_(mean_t)
    elif layer.bias is not None:
        layer.bias.copy_(mean_t - after @ mean_f)


@torch.no_grad()
def refit_in_a_row(
    chain: Chain,
    students: Mapping[int, nn.Module],
    paths: Mapping[int, Sequence[str]],
    images: Sequence[Tensor],
    gives: Mapping[int, Narrowed] | None = None,
) -> int:
    """Fit the student blocks `students`, by the index of the block for which each stands, to what they get behind one
    another; return how many layers were fitted. `images` are batches of the network's input; `gives` are for students
    whose output is narrower than the teacher's."""
    done = 0
    inputs: list[Pair] = [(x, x) for x in images]
    for index in range(len(chain.blocks)):
        teacher = chain.block_module(index).eval()
        student = students.get(index)
        if student is not None and any(True for _ in student.parameters()):
            done += refit_block(student.eval(), teacher, inputs, paths[index], (gives or {}).get(index, _whole))
        inputs = [(teacher(theirs), (student or teacher)(own)) for theirs, own in inputs]
    return done
