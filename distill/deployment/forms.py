"""The form in which a network is exported: what computes the same in two ways is exported in the faster one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from distill.blocks.chain import copied, share_tensors
from distill.blocks.tracing import UntraceableError, symbolic_graph
from distill.deployment.graphs import NotExportableError
from distill.deployment.stopwatch import Piece, Stopwatch
from distill.recipes.separable import SeparableConv2d, foldable

REPEATED, BRANCHES = "repeated input", "sum of branches"  # of separable convolutions with several filters a channel


def forms_of(network: nn.Module) -> list[nn.Module]:
    """Return a network, and the same function in another form where there is one."""
    other = with_branches(network)
    return [network] if other is None else [network, other]


def with_branches(network: nn.Module) -> nn.Module | None:
    """Return a copy of a network with separable convolutions as sums of branches; None where no form is another.

    Batch norms behind them are folded in, which runtimes do behind a convolution, but not behind a sum.
    """
    if not any(_several(network)):
        return None
    other = copied(network).eval()
    norms = _norms_behind(other)
    for path, layer in list(_several(other)):
        norm = norms.get(path)
        _put(other, path, layer.as_branches(None if norm is None else other.get_submodule(norm)))
        if norm is not None:
            _put(other, norm, nn.Identity())
    return other


def _put(network: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)


def _several(network: nn.Module) -> Iterator[tuple[str, SeparableConv2d]]:
    for path, layer in network.named_modules():
        if isinstance(layer, SeparableConv2d) and layer.rank > 1:
            yield path, layer


def _norms_behind(network: nn.Module) -> dict[str, str]:
    """Return the batch norm that alone reads what a separable convolution gives, and nothing else, by paths; none of
    networks that cannot be traced."""
    try:
        # of a copy: what the network's code keeps of a trace shall not be exported
        nodes = [node for node in symbolic_graph(share_tensors(network)).nodes if node.op == "call_module"]
    except UntraceableError:
        return {}
    calls = Counter(node.target for node in nodes)
    layers = {f"{path}.pointwise": path for path, _ in _several(network)}
    found = {}
    for node in (one for one in nodes if one.target in layers and calls[one.target] == 1 and len(one.users) == 1):
        (reader,) = node.users
        called_once = reader.op == "call_module" and calls[reader.target] == 1
        if called_once and foldable(network.get_submodule(str(reader.target))):
            found[layers[node.target]] = str(reader.target)
    return found


def faster_form(
    network: nn.Module, stopwatch: Stopwatch, *, image_shape: tuple[int, ...], batch: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network, or the same function in another form where that is faster, on batches of that size; and what
    was found, for metrics.json: nothing where there is one form alone, or none can be exported."""
    forms, sample = forms_of(network), torch.zeros(batch, *image_shape)
    if len(forms) == 1:
        return network, {}
    try:
        repeated, branches = (stopwatch.runtime.whole(form, sample) for form in forms)
    except NotExportableError:
        return network, {}
    before = stopwatch.alone(Piece(repeated, sample, REPEATED)).median_ms
    (longer,) = stopwatch.differences(repeated, {BRANCHES: [branches]}, sample)[BRANCHES]
    faster = longer.median_ms < 0
    found = {REPEATED: before, BRANCHES: before + longer.median_ms}
    runtime = stopwatch.runtime.name
    return forms[faster], {"form": BRANCHES if faster else REPEATED, "ms": found, "batch": batch, "runtime": runtime}
