"""How many bytes of activations are alive at once while a network computes: from its operations in their order.

An activation is alive from the operation that gives it to the last one that reads it, whatever the network's code still
holds in variables. Operations on every element alone (activations, sums, batch norms in use) put their result in the
place of an operand of that size that nothing reads afterwards, as runtimes plan it; views take no place of their own.
What a kernel needs inside is not counted, nor what runtimes lose to alignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.blocks.chain import copied

ALSO_IN_PLACE = {"native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"}


@torch.no_grad()
def peak_activations(module: nn.Module, x: Tensor) -> int:
    """Return the bytes of activations, input and output among them, that are alive at once at most while a module in
    use computes `x`, of which only the form counts; it is left alone."""
    imagined = copied(module).eval().to("meta")
    weights = {_place(tensor) for tensor in (*imagined.parameters(), *imagined.buffers())}
    given = torch.empty_like(x, device="meta")
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation, of which nothing inside is seen
    try:
        with _Recorder(weights) as recorder:
            output = imagined(given)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return _peak(recorder.steps, recorder.places(given), recorder.places(output))


Places = dict[int, int]  # bytes by the memory that tensors lie in


@dataclass(frozen=True)
class _Step:
    in_place: bool  # whether its result may lie where an operand was
    reads: Places
    gives: Places


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operations; holds on to all tensors, so that none takes another one's name."""

    def __init__(self, weights: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[_Step] = []
        self._weights, self._held = weights, list[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._held += [args, kwargs, result]
        in_place = torch.Tag.pointwise in func.tags or func.overloadpacket.__name__ in ALSO_IN_PLACE
        self.steps.append(_Step(in_place, self.places((args, kwargs)), self.places(result)))
        return result

    def places(self, values: Any) -> Places:
        """Return where tensors lie, weights left out."""
        found = {_place(one): one.untyped_storage().nbytes() for one in tree_leaves(values) if isinstance(one, Tensor)}
        return {place: size for place, size in found.items() if place not in self._weights}


def _peak(steps: Sequence[_Step], given: Places, output: Places) -> int:
    last = {place: number for number, step in enumerate(steps) for place in (*step.gives, *step.reads)}
    last |= dict.fromkeys(output, len(steps))
    alive = dict(given)
    peak = sum(alive.values())
    for number, step in enumerate(steps):
        new = {place: size for place, size in step.gives.items() if place not in alive}
        if step.in_place:
            wanted = next(iter(new.values()), None)
            free = [one for one in step.reads if last[one] == number and alive.get(one) == wanted]
            for taken in free[:1]:
                del alive[taken]
        alive |= new
        peak = max(peak, sum(alive.values()))
        alive = {place: size for place, size in alive.items() if last[place] > number}
    return peak


def _place(tensor: Tensor) -> int:
    """Return what tensors that share memory, also where it is only imagined, have in common while they exist."""
    return int(tensor.untyped_storage()._cdata)
