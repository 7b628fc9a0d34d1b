"""Whether groups of channels are what they are taken for, shown on a sample before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distill.blocks.chain import agree
from distill.recipes.group import Group, others, paths_of, places_in, take_away
from distill.recipes.recipe import Kept
from distill.recipes.thin_start import columns


def sound(modules: Sequence[nn.Module], x: Tensor, groups: Sequence[Group]) -> tuple[list[Group], Kept]:
    """Return those groups of blocks in a row that are shown to be what they are taken for, and why others stay; `x` is
    the first one's input."""
    if not groups or _failure(modules, x, groups) is None:
        return list(groups), {}
    failures = {group: _failure(modules, x, [group]) for group in groups}
    alone = [group for group, failure in failures.items() if failure is None]
    together = _failure(modules, x, alone) if alone else None
    kept = {site.path: failure for group, failure in failures.items() if failure for site in group.producers}
    if together is None:
        return alone, kept
    return [], kept | {site.path: together for group in alone for site in group.producers}


def _failure(modules: Sequence[nn.Module], x: Tensor, groups: Sequence[Group]) -> str | None:
    """Return in words why blocks could not do without some units of these groups, or None: where their readers have
    zeros for these, they must give the same without them, and hand gradients to what is left."""
    generator = torch.Generator().manual_seed(0)
    kept = [torch.randperm(group.units, generator=generator)[: group.kept].sort().values for group in groups]
    students = nn.Sequential(*map(copy.deepcopy, modules))
    paths = [places_in(student) for student in students]
    parts = [[group.within(places) for group in groups] for places in paths]
    try:
        with torch.no_grad():
            for student, own in zip(students, parts, strict=True):
                for group, units in zip(own, kept, strict=True):
                    _close_readers(student, group, others(group.units, units))
            wanted = students(x)
            for student, own in zip(students, parts, strict=True):
                take_away(student, own, kept)
            if not agree(students(x), wanted):
                return "without some of its channels, the block gives something else"
        students.train()(x).sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a network's own code can raise anything
        reason = str(error).strip().partition("\n")[0]
        return f"without some of its channels, the block fails: {type(error).__name__}: {reason}"
    layers = [
        student.get_submodule(path) for student, own in zip(students, parts, strict=True) for path in paths_of(own)
    ]
    learning = all(parameter.grad is not None for layer in layers for parameter in layer.parameters())
    return None if learning else "no gradient reaches it"


def _close_readers(block: nn.Module, group: Group, units: Tensor) -> None:
    for site in group.inputs:
        weight = block.get_submodule(site.path).weight
        assert isinstance(weight, Tensor)
        columns_of_units = columns(weight, site, units).flatten().to(weight.device)
        weight.copy_(weight.flatten(1).index_fill(1, columns_of_units, 0.0).view(weight.shape))
