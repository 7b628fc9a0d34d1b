"""One rank's curves for TensorBoard. Knows nothing of what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FLUSH_S = 10


class Scalars:
    """Writes event files into `folder`, from the first value on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def add(self, tag: str, value: float, step: int) -> None:
        """Add a point to the curve `tag` (group/name)."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # here: importing it takes half a second

            self._writer = SummaryWriter(str(self._folder), flush_secs=FLUSH_S)
        self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        """Write what is still in memory."""
        if self._writer is not None:
            self._writer.close()
