"""What keeps a network from being cut: the value, or the weights, that are needed again the furthest away."""

from __future__ import annotations

from torch import fx

from distill.blocks.tracing import Trace, module_stack


def obstacle(trace: Trace) -> str:
    """Return in words what is alive the longest between the first operation of a network and the last."""
    nodes = list(trace.segments[0].source.graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    spans = [
        (place[last] - place[node], f"what {_name(node)} gives is still needed by {_name(last)}")
        for node in nodes
        if node.users and node.op != "get_attr"
        for last in [max(node.users, key=place.__getitem__)]
    ]
    used: dict[int, list[fx.Node]] = {}
    for node in nodes:
        module = trace.module(node)
        for parameter in module.parameters() if module is not None else ():
            used.setdefault(id(parameter), []).append(node)
    spans += [
        (place[users[-1]] - place[users[0]], f"weights of {_name(users[0])} are used again by {_name(users[-1])}")
        for users in used.values()
    ]
    return max(spans, key=lambda span: span[0])[1]


def _name(node: fx.Node) -> str:
    """Return the module that an operation is in, or the operation's own name."""
    if node.op == "placeholder":
        return "the input"
    stack = [path for _, path, _ in module_stack(node) if path]
    return stack[-1] if stack else f"{node.name} in forward()"
