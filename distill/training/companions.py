"""What goes along with a network while it is fine-tuned, without being part of its loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

from torch import Tensor


class Companion:
    """What goes along with a network as it is fine-tuned, step by step: by default nothing happens.

    On several ranks every rank has one, and all do the same.
    """

    def before_step(self, step: int, total: int) -> None:
        """Called where gradients are known, and the same on all ranks, and the weights not yet changed."""

    def after_step(self, step: int, total: int) -> None:
        """Called where the weights have been changed."""

    def judged(self) -> AbstractContextManager[None]:
        """Return a context in which the network has the weights to judge and to keep."""
        return nullcontext()

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint has to hold."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what state() returned; from nothing, as in the beginning."""


@contextmanager
def all_judged(companions: Sequence[Companion]) -> Iterator[None]:
    """Let the network have the weights that are judged and kept, of all companions."""
    with ExitStack() as stack:
        for companion in companions:
            stack.enter_context(companion.judged())
        yield
