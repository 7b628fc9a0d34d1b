"""Cuts a network along a list of its modules, where no trace of it can be cut there. Knows nothing of tracing.

The network runs as it is, up to the deepest boundary asked for, and forward hooks hear what passes the modules' edges.
A skip connection may pass a listed module by: it stays inside the network, and only the module's own tensors are heard.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import Tensor, nn

from distill.blocks.chain import (
    Block,
    Boundary,
    Chain,
    agree,
    made_trainable,
    parameter_owners,
    share_tensors,
    switch_off_in_place,
)
from distill.errors import ConfigError

Tap = tuple[str, str]  # where a tensor is heard: (module path, "in" or "out")


# No Exception: the code of a network may catch those, and go on.
class _EnoughError(BaseException):
    """Ends a forward pass whose remaining boundaries nobody needs."""


class HookedChain(Chain):
    """A chain over listed modules; what lies between them has no students and can only run with the rest."""

    def __init__(self, model: nn.Module, sample: Tensor, output: Tensor, modules: Sequence[str]) -> None:
        """Listen to `model`, which gives `output` for `sample`, at `modules`: existing paths in the order they run.

        Raises ConfigError on blocks.modules if a module does not take and return exactly one tensor, once.
        """
        self._root = share_tensors(model)
        switch_off_in_place(self._root)
        heard, result, self.first_convolution = _listen_to_sample(self._root, sample, modules)
        if not agree(result, output):
            raise ConfigError(
                "blocks.modules", list(modules), "a network that does not rely on layers working in place"
            )
        names: list[str] = []
        self._paths: list[str | None] = []  # of each block; None for what lies between listed modules
        self._taps: list[Tap | None] = [None]  # where each boundary is heard; None for the network's ends
        tensors = [sample]

        def add(name: str, path: str | None, tap: Tap | None, end: Tensor) -> None:
            names.append(name)
            self._paths.append(path)
            self._taps.append(tap)
            tensors.append(end)

        for path in modules:
            if heard[path, "in"] is not tensors[-1]:
                add(f"before {path}", None, (path, "in"), heard[path, "in"])
            add(path, path, (path, "out"), heard[path, "out"])
        if result is not tensors[-1]:
            add(f"after {modules[-1]}", None, None, result)
        self.boundaries = tuple(Boundary.of(tensor) for tensor in tensors)
        self.blocks = tuple(self._block(index, name) for index, name in enumerate(names))

    def _block(self, index: int, name: str) -> Block:
        path = self._paths[index]
        if path is None:
            return Block(index, name, (), ())
        module = self._root.get_submodule(path)
        inside = [(f"{path}.{inner}" if inner else path, one) for inner, one in module.named_modules()]
        convolutions = tuple(inner for inner, one in inside if isinstance(one, nn.Conv2d))
        return Block(index, name, convolutions, tuple(parameter_owners(module, path)))

    @property
    def divisible(self) -> bool:
        return False

    @torch.no_grad()
    def run(self, x: Tensor, *, last: int, keep: Collection[int], first: int = 0) -> dict[int, Tensor]:
        if first > 0:
            raise NotImplementedError("a network that is only hooked runs from its input")
        assert all(0 <= boundary <= last <= len(self.blocks) for boundary in keep), (last, keep)
        x = self.boundaries[0].conform(x)
        heard = {0: x}

        def hear(boundary: int, tensor: Tensor) -> None:
            heard[boundary] = tensor
            if boundary == last:
                raise _EnoughError

        if last > 0:
            with suppress(_EnoughError):
                self._listen(x, {last, *keep}, hear)
        return {boundary: self.boundaries[boundary].conform(heard[boundary]) for boundary in keep}

    @torch.no_grad()
    def _listen(self, x: Tensor, wanted: Collection[int], hear: Callable[[int, Tensor], None]) -> None:
        """Run the network and call `hear` with each of the boundaries `wanted` behind the input, as it passes."""
        taps = {tap: boundary for boundary, tap in enumerate(self._taps) if tap is not None and boundary in wanted}

        def tapped(tap: Tap, value: object) -> None:
            if tap in taps:
                assert isinstance(value, Tensor), tap  # it was one on the sample
                hear(taps[tap], value)

        with _hooks(self._root, {path for path, _ in taps}, tapped):
            result = self._root(x)
        if self._taps[-1] is None and len(self.blocks) in wanted:
            hear(len(self.blocks), result)

    def counted(self, x: Tensor, counter: Callable[[], float]) -> Iterator[tuple[float, Tensor]]:
        readings: list[float] = []
        heard: list[Tensor] = []

        def hear(boundary: int, tensor: Tensor) -> None:
            readings.append(counter())
            heard.append(self.boundaries[boundary].conform(tensor))

        x = self.boundaries[0].conform(x)
        start = counter()
        self._listen(x, range(1, len(self.boundaries)), hear)
        for before, reading, tensor in zip([start, *readings], readings, heard, strict=False):
            yield reading - before, tensor

    @torch.no_grad()
    def run_block(self, index: int, x: Tensor) -> Tensor:
        module = self._root.get_submodule(self._path(index))
        return self.boundaries[index + 1].conform(module(self.boundaries[index].conform(x)))

    def run_with(self, students: Mapping[int, nn.Module], x: Tensor) -> Tensor:
        with torch.no_grad(), ExitStack() as stack:
            for index, student in students.items():
                module = self._root.get_submodule(self._path(index))

                def answer(
                    _: nn.Module, args: tuple[Tensor, ...], _result: Tensor, student: nn.Module = student
                ) -> Tensor:
                    return student(*args)  # type: ignore[no-any-return]

                stack.callback(module.register_forward_hook(answer).remove)
            return self._root(x)  # type: ignore[no-any-return]

    def block_module(self, index: int) -> nn.Module:
        path = self._path(index)
        return made_trainable(_Nested(copy.deepcopy(self._root.get_submodule(path)), path))

    def _path(self, index: int) -> str:
        path = self._paths[index]
        if path is None:
            name = self.blocks[index].name
            raise NotImplementedError(f"block {index} ({name}) lies between listed modules and cannot run alone")
        return path


class _Nested(nn.Module):
    """One module under its full path, so that all names are those it has in the network."""

    def __init__(self, module: nn.Module, path: str) -> None:
        super().__init__()
        *outer, name = path.split(".")
        parent: nn.Module = self
        for part in outer:
            child = nn.Module()
            parent.add_module(part, child)
            parent = child
        parent.add_module(name, module)
        self._path = path

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self._path)(x)  # type: ignore[no-any-return]


@contextmanager
def _hooks(root: nn.Module, paths: Iterable[str], hear: Callable[[Tap, object], None]) -> Iterator[None]:
    """While open, call `hear` with what enters and leaves each module: one value, or a tuple of several."""
    with ExitStack() as stack:
        for path in paths:
            module = root.get_submodule(path)

            def enter(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], path: str = path) -> None:
                single = len(args) == 1 and not kwargs
                hear((path, "in"), args[0] if single else (*args, *kwargs.values()))

            def leave(_: nn.Module, _args: object, result: object, path: str = path) -> None:
                hear((path, "out"), result)

            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield


@torch.no_grad()
def _listen_to_sample(
    root: nn.Module, sample: Tensor, modules: Sequence[str]
) -> tuple[dict[Tap, Tensor], Tensor, str | None]:
    """Run `sample` and return the tensors at the edges of `modules`, the output, and the path of the convolution that
    runs first; raise what stands against the modules."""
    heard: dict[Tap, Tensor] = {}
    versions: dict[Tap, int] = {}
    convolutions = [path for path, module in root.named_modules() if isinstance(module, nn.Conv2d)]
    used: list[str] = []

    def hear(tap: Tap, value: object) -> None:
        path, side = tap
        if not isinstance(value, Tensor):
            what = f"{len(value)} values" if isinstance(value, tuple) else type(value).__name__
            allowed = (
                f"a module with one tensor in and one tensor out; {what} {'enter' if side == 'in' else 'leave'} it"
            )
            raise ConfigError("blocks.modules", path, allowed)
        if tap in heard:
            raise ConfigError("blocks.modules", path, "a module that runs once; this one runs again")
        # PyTorch raises a tensor's version with every change in place, through whichever view.
        heard[tap], versions[tap] = value, value._version

    before = sample._version
    with _hooks(root, convolutions, lambda tap, _: used.append(tap[0])), _hooks(root, modules, hear):
        result: Tensor = root(sample)
    ran = [path for path, side in heard if side == "in"]
    for path in modules:
        if path not in ran:
            raise ConfigError("blocks.modules", path, "a module that the network runs")
    if ran != list(modules):
        raise ConfigError("blocks.modules", list(modules), f"the modules in the order in which they run: {ran}")
    changed = [path for (path, side), tensor in heard.items() if tensor._version != versions[path, side]]
    if changed or sample._version != before:
        where = changed[0] if changed else modules[0]
        raise ConfigError("blocks.modules", where, "a place whose tensor is not changed in place later on")
    return heard, result, used[0] if used else None
