"""The activations of students: what takes the place of ReLU in the blocks that recipes have changed.

A block's changes name the modules under `activations`, beside what its recipe has to say, so that whoever builds the
block again has the same ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import fx, nn

from distill.profiling.statistics import InputStatistics
from distill.recipes.recipe import Changes, Recipe
from distill.recipes.segments import LightSegments

ACTIVATIONS: dict[str, type[nn.Module]] = {"lma": LightSegments}
KEY = "activations"  # in changes: name of the activation -> paths


def relus(module: nn.Module) -> list[str]:
    """Return the paths of the modules that are ReLU, of one at several places the first."""
    return [path for path, part in module.named_modules() if type(part) is nn.ReLU]


def calls_relu(module: nn.Module) -> bool:
    """Whether the code of a traced block calls ReLU as a function, in whose place nothing can be put."""
    graphs = (part.graph for part in module.modules() if isinstance(part, fx.GraphModule))
    called = (node for graph in graphs for node in graph.nodes if node.op in ("call_function", "call_method"))
    return any(getattr(node.target, "__name__", node.target) in ("relu", "relu_") for node in called)


def with_activation(changes: Changes, name: str, student: nn.Module, others: Collection[str]) -> Changes:
    """Return a block's changes with another activation for the ReLUs of its student, but for `others`, which run in
    other blocks as well."""
    paths = [path for path in relus(student) if path not in others]
    return {**changes, KEY: {name: paths}} if paths else changes


def made_student(
    recipe: Recipe,
    block: nn.Module,
    changes: Changes,
    generator: torch.Generator | None = None,
    statistics: Mapping[str, InputStatistics] | None = None,
) -> nn.Module:
    """Return the student of a block as Recipe.student() makes it, with its activations."""
    student = recipe.student(block, changes, generator, statistics)
    _replace(student, changes)
    return student


def install(recipe: Recipe, network: nn.Module, changes: Changes) -> None:
    """Make a block's changes in a network, as Recipe.install() does, its activations among them."""
    recipe.install(network, changes)
    _replace(network, changes)


def _replace(root: nn.Module, changes: Changes) -> None:
    device = next((weight.device for weight in root.parameters()), torch.device("cpu"))
    for name, paths in changes.get(KEY, {}).items():
        for path in paths:
            _put(root, root.get_submodule(path), ACTIVATIONS[name]().to(device))


def _put(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another one, at all places that it has."""
    new.train(old.training)
    places: Iterable[str] = [path for path, part in root.named_modules(remove_duplicate=False) if part is old]
    for place in places:
        root.set_submodule(place, new)
