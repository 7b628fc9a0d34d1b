"""Which layers of a block a recipe replaces: those that it makes cheaper, and for which it is shown, on a sample
and before anything is trained, that the block runs, learns, and is the teacher's at full size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from distill.recipes.plain import Layer, OddLayerError, plain_form
from distill.recipes.recipe import Kept
from distill.recipes.replacement import Replacing, replace_layers

TOLERANCE = 1e-2  # relative error at full size; tf32 explains 1e-3
CROP = 64  # pixels a side that are enough to compare two layers


def select(block: nn.Module, x: Tensor, paths: Sequence[str], recipe: Replacing) -> tuple[tuple[str, ...], Kept]:
    """Return those of the layers at `paths` that `recipe` replaces in `block`, and why it keeps the others.

    `x` are two rows or more of the block's input. `block` must be a copy: its mode and its statistics change.
    """
    heard = _listen(block.eval(), x, paths)
    owners = _owners(block)
    kept: Kept = {}
    for path in paths:
        reason = _objection(block.get_submodule(path), heard[path], recipe, owners)
        if reason is not None:
            kept[path] = reason
    remaining = [path for path in paths if path not in kept]
    if remaining and _failure(block, x, remaining, recipe) is not None:
        for path in remaining:
            failure = _failure(block, x, [path], recipe)
            if failure is not None:
                kept[path] = failure
        remaining = [path for path in paths if path not in kept]
        failure = _failure(block, x, remaining, recipe) if remaining else None
        if failure is not None:
            kept |= dict.fromkeys(remaining, failure)
            remaining = []
    return tuple(remaining), kept


def ways_of(block: nn.Module, paths: Iterable[str], recipe: Replacing) -> dict[str, Replacing]:
    """Return how `recipe` replaces each of the layers at `paths`."""
    return {path: recipe.sized(plain_form(block.get_submodule(path)).layer) for path in paths}  # type: ignore[arg-type]


@torch.no_grad()
def _listen(block: nn.Module, x: Tensor, paths: Iterable[str]) -> Mapping[str, list[Tensor]]:
    """Return the inputs that each layer gets when `block` runs on `x`, one for every use of it."""
    heard: dict[str, list[Tensor]] = {path: [] for path in paths}
    hooks = []
    for path, inputs in heard.items():

        def hear(_: nn.Module, args: tuple[Tensor, ...], inputs: list[Tensor] = inputs) -> None:
            inputs += args

        hooks.append(block.get_submodule(path).register_forward_pre_hook(hear))
    try:
        block(x)
    finally:
        for hook in hooks:
            hook.remove()
    return heard


def _owners(block: nn.Module) -> Mapping[int, list[str]]:
    """Return, by its id, the paths of the modules that own each parameter; a module at several places counts once."""
    owners: dict[int, list[str]] = {}
    for path, module in block.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path)
    return owners


def _objection(
    layer: nn.Module, inputs: list[Tensor], recipe: Replacing, owners: Mapping[int, list[str]]
) -> str | None:
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return "its channels are in groups"
    if not inputs:
        return "the network does not run it"
    for parameter in layer.parameters():
        if len(owners[id(parameter)]) > 1:
            return f"a weight of it belongs to {' and '.join(owners[id(parameter)])}"
    try:
        form = plain_form(layer)
    except OddLayerError as odd:
        return str(odd)
    if not recipe.fits(form.layer):
        return "of no kind that the recipe replaces"
    way = recipe.sized(form.layer)
    return _too_large(form.layer, inputs[0], way) or _inexact(layer, form.pad, form.layer, inputs[0], way)


@torch.no_grad()
def _too_large(layer: Layer, x: Tensor, way: Replacing) -> str | None:
    """Return in words how the replacement exceeds what it replaces, or None."""
    before, after = way.compared(layer, (1, *x.shape[1:]))
    return after.more_than(before)


@torch.no_grad()
def _inexact(layer: Layer, pad: nn.Module | None, plain: Layer, x: Tensor, way: Replacing) -> str | None:
    """Return in words how far the recipe at full size is from `layer`, or None where it gives the same."""
    if x.device.type == "meta":
        return None
    full = way.at_full_size(plain)
    if full is None:
        return None
    crop = x[:1]
    if isinstance(layer, nn.Conv2d):
        reach = max((size - 1) * step + 1 for size, step in zip(layer.kernel_size, layer.dilation, strict=True))
        crop = crop[:, :, : max(CROP, reach), : max(CROP, reach)]
    wanted, found = layer(crop), full(crop if pad is None else pad(crop))
    if wanted.shape != found.shape:
        return f"its replacement would give {tuple(found.shape[1:])} for {tuple(wanted.shape[1:])}"
    error = float((found - wanted).norm() / wanted.norm().clamp_min(torch.finfo(wanted.dtype).tiny))
    return f"the recipe at full size is {error:.2g} off" if not error <= TOLERANCE else None


def _failure(block: nn.Module, x: Tensor, paths: Sequence[str], recipe: Replacing) -> str | None:
    """Return in words why `block` could not be trained with replacements at `paths`, or None."""
    with torch.no_grad():
        wanted = block(x)
    student = copy.deepcopy(block)
    try:
        replace_layers(student, ways_of(student, paths, recipe))
        with torch.no_grad():
            student.eval()(x.float())  # a faster way through a layer, taken here alone, may read weights that are gone
        found = student.train()(x.float())
        if not isinstance(found, Tensor) or found.shape != wanted.shape:
            return "with its replacement, the block gives something else in training mode"
        found.sum().backward()  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a network's own code can raise anything
        return (
            f"with its replacement, the block fails: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        )
    learning = [parameter.grad for path in paths for parameter in student.get_submodule(path).parameters()]
    return None if all(gradient is not None for gradient in learning) else "no gradient reaches it"
