"""Which layers of a block are more than their weights: nothing can be taken away from one of these without looking."""

from __future__ import annotations

import operator
from collections import Counter

import torch
from torch import fx, nn

from distill.recipes.plain import OddLayerError, plain_form


def odd_layers(module: fx.GraphModule) -> dict[str, str]:
    """Return why layers, by path, must stay: their weights are used elsewhere too, or are not all they work with."""
    graph = module.graph
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    times = Counter(id(module.get_submodule(path)) for path in calls)
    users = Counter(id(tensor) for one in module.modules() for tensor in one.parameters(recurse=False))
    users.update(id(operator.attrgetter(str(node.target))(module)) for node in graph.nodes if node.op == "get_attr")
    odd: dict[str, str] = {}
    for path in calls:
        layer = module.get_submodule(path)
        if times[id(layer)] > 1 or any(users[id(tensor)] > 1 for tensor in layer.parameters()):
            odd[path] = "a weight of it is used more than once"
        elif not _is_plain(layer):
            odd[path] = f"a {type(layer).__name__} that works with more than its weights"
    return odd


def _is_plain(layer: nn.Module) -> bool:
    if any(True for child in layer.children() for _ in child.parameters()):
        return False
    if isinstance(layer, nn.Conv2d | nn.Linear):
        try:
            form = plain_form(layer)
        except OddLayerError:
            return False
        # A kernel that is standardised or normalised first is not what is left of it when some of it is taken away.
        weight = layer._parameters.get("weight")
        return form.layer is layer or (
            weight is not None and (weight.is_meta or torch.equal(form.layer.weight, weight))
        )
    return True
