"""What every recipe is: it sees a block, says what it would change and what that costs, builds it, and starts it.

A recipe is a frozen dataclass, whose fields are its options. What it changes is plain data: together with its name and
options it rebuilds the block in a network of the same architecture, without the teacher's weights (student.json).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distill.errors import ConfigError, one_of
from distill.profiling.flops import module_flops
from distill.profiling.statistics import InputStatistics

Changes = dict[str, Any]  # JSON values
Kept = dict[str, str]  # path of what stays as it is -> why
Ends = tuple[tuple[tuple[int, ...], ...] | None, tuple[tuple[int, ...], ...] | None]


Refusal = Callable[[Any], str | None]  # what is expected instead of a value; None where it will do


def option(default: Any, help: str, refusal: Refusal | None = None) -> Any:
    """Declare an option of a recipe, with one line of help, and what its values may be. Where None is the default, it
    is always allowed."""
    return field(default=default, metadata={"help": help, "refusal": refusal})


def share(value: float) -> str | None:
    """Refuse what is no share of a whole."""
    return None if 0 < value <= 1 else "a number above 0 and up to 1"


def count(value: int) -> str | None:
    """Refuse what is no number of things."""
    return None if value >= 1 else "an integer >= 1"


def among(*choices: str) -> Refusal:
    """Return what refuses all but these."""
    return lambda value: None if value in choices else one_of(choices, value)


INIT = among("data", "teacher", "random")


@dataclass(frozen=True)
class Cost:
    """Parameters, and FLOPs of one image in use (two per multiply-add)."""

    params: int
    flops: int

    def more_than(self, before: Cost) -> str | None:
        """Return in words by what a replacement would cost more than what it replaces; None where it does not."""
        if self.params > before.params:
            return f"its replacement would have {self.params:,} parameters for {before.params:,}"
        if self.flops > before.flops:
            return f"its replacement would take {self.flops:,} FLOPs an image for {before.flops:,}"
        return None


@dataclass(frozen=True)
class View:
    """A block as a recipe sees it. `module` is a trainable copy (its mode and statistics may change), whose modules
    and weights have the teacher's own qualified names: an fx.GraphModule where the teacher was traced. `sample` are two
    rows or more of its input; on the meta device nothing has values. `changeable` are the paths that the user lets
    change, in the order of use, of `convolutions` alone where a recipe asks for these. `path` is the one module of the
    network that the whole block is; None where the block's seams are in the network's own code."""

    name: str
    module: nn.Module
    sample: Tensor
    convolutions: tuple[str, ...]
    changeable: frozenset[str]
    path: str | None

    @property
    def cost(self) -> Cost:
        """What the block costs as it is."""
        params = sum(parameter.numel() for parameter in self.module.parameters())
        return Cost(params, module_flops(self.module.eval(), self.sample[:1]))


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """A way to make a block cheaper."""

    replaces: ClassVar[str]  # in words, for "a network with ..."

    @property
    def regressed(self) -> bool:
        """Whether the student's batch norms are to be estimated, and the layers that its output is a sum of fitted."""
        return False

    def __post_init__(self) -> None:
        for one in fields(self):
            value, refusal = getattr(self, one.name), one.metadata.get("refusal")
            expected = None if refusal is None or (value is None and one.default is None) else refusal(value)
            if expected is not None:
                raise ConfigError(f"student.options.{one.name}", value, expected)

    def options(self) -> dict[str, Any]:
        """Return the constructor's keyword arguments, all JSON values."""
        return asdict(self)

    @abstractmethod
    def propose(self, view: View) -> tuple[Changes | None, Kept]:
        """Return what it would change in a block, None where nothing, and why other things stay."""

    @abstractmethod
    def cost(self, view: View, changes: Changes) -> Cost:
        """Return what the changed block will cost, without building it."""

    @abstractmethod
    def student(
        self,
        block: nn.Module,
        changes: Changes,
        generator: torch.Generator | None = None,
        statistics: Mapping[str, InputStatistics] | None = None,
    ) -> nn.Module:
        """Return the student of a block, in its mode and on its device; `block` may be changed in place.

        Its weights have the names that they will have in the network. With a generator they are its first weights,
        a function of the block's and of these arguments alone; without one they are left for a state dict to fill.
        """

    @abstractmethod
    def install(self, network: nn.Module, changes: Changes) -> None:
        """Make the changes in a network of the teacher's architecture, in place; weights are not yet meaningful."""

    @abstractmethod
    def paths(self, changes: Changes) -> list[str]:
        """Return the paths of the modules that are replaced."""

    def wants(self, changes: Changes) -> list[str]:
        """Return the paths of the teacher's modules whose inputs' statistics its first weights need."""
        return []

    def ends(self, changes: Changes) -> Ends:
        """Return for every channel of the student's input, and of its output, the teacher's channels whose mean it is;
        None where they are the teacher's own."""
        return None, None

    def unwatched(self, changes: Changes) -> list[str]:
        """Return the paths of modules of which statistics would be wanted that cannot be had, since they pad inputs in
        a forward() of their own. Their first weights come from weights alone."""
        return []

    def suits(self, network: nn.Module, *, first_layer: bool) -> bool:
        """Whether there is anything in a network that it could replace; without `first_layer` not in its first one."""
        return True
