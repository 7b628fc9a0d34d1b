"""Channels of zeros that a network's code puts beside others, as in the shortcuts without weights of small ResNets, and
fewer of them: in a traced block by another number, in a network behind the module that adds them.
"""

from __future__ import annotations

from torch import Tensor, fx, nn

from distill.blocks.tracing import module_stack


class Cropped(nn.Module):
    """What a module without weights gives, less its first and last channels along `dim`, counted from the last one."""

    def __init__(self, module: nn.Module, dim: int, before: int, after: int) -> None:
        super().__init__()
        self.module, self.dim, self.before, self.after = module, dim, before, after

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y.narrow(self.dim, self.before, y.shape[self.dim] - self.before - self.after)


def is_padding(node: fx.Node) -> bool:
    """Whether an operation is torch.nn.functional.pad()."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "pad"


def padder(module: fx.GraphModule, padding: fx.Node) -> str | None:
    """Return the path of the module without weights whose result an operation in a block is; None where it has none."""
    *_, (call, path, _) = module_stack(padding) or [("", "", nn.Module)]
    inside = [node for node in module.graph.nodes if call in _calls(node)]
    leaving = {node for node in inside if any(call not in _calls(user) for user in node.users)}
    # What ends the block may be in the middle of the module.
    ending = any(user.op == "output" for user in padding.users)
    if not path or leaving != {padding} or ending or any(_has_weights(module, node) for node in inside):
        return None
    return path


def _calls(node: fx.Node) -> list[str]:
    return [call for call, _, _ in module_stack(node)]


def _has_weights(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" or (
        node.op == "call_module" and bool(module.get_submodule(str(node.target)).state_dict())
    )


def remove_zeros(network: nn.Module, path: str, dim: int, before: int, after: int) -> None:
    """Let the module at `path`, or its operations in a traced block, give fewer zeros before and after other channels
    along the dimension `dim`, counted from the last one."""
    padding = _padding(network, path) if isinstance(network, fx.GraphModule) else None
    if padding is None:
        network.set_submodule(path, Cropped(network.get_submodule(path), dim, before, after))
        return
    assert isinstance(network, fx.GraphModule)
    amounts: list[int] = list(padding.args[1])  # type: ignore[arg-type]
    first = 2 * (-dim - 1)
    amounts[first], amounts[first + 1] = amounts[first] - before, amounts[first + 1] - after
    padding.update_arg(1, tuple(amounts))
    network.recompile()


def _padding(module: fx.GraphModule, path: str) -> fx.Node | None:
    """Return the operation that is the result of the module at `path`."""
    paddings = filter(is_padding, module.graph.nodes)
    return next((node for node in paddings if path in [place for _, place, _ in module_stack(node)][-1:]), None)
