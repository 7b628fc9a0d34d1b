"""What SIGTERM, SIGINT and SIGHUP mean while something runs that can go on later: stop, in order. Knows no job."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stop(SystemExit):
    """The process was told to stop. Its code is the exit status that a shell expects, 128 + the signal's number.

    No Exception: whoever reports failures and goes on, as Hydra does between two jobs, lets it pass.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.status = 128 + signum
        self.signal = signal.Signals(signum).name


class Stopper:
    """The handler of these signals: raises Stop where the main thread is."""

    def __init__(self) -> None:
        self._told: int | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self._told = signum
        raise Stop(signum)

    def check(self) -> None:
        """Raise Stop again if it was raised and lost, for example in an import that something else caught."""
        if self._told is not None:
            raise Stop(self._told)


@contextmanager
def stoppable() -> Iterator[Stopper]:
    """Let these signals raise Stop within, and mean afterwards what they meant before. Nested, the outer one stays.

    What fails because it was interrupted, such as an import, is a Stop too. Outside the main thread, where Python
    allows no handlers, nothing changes.
    """
    outer = signal.getsignal(signal.SIGTERM)
    nested = isinstance(outer, Stopper) or threading.current_thread() is not threading.main_thread()
    stopper = outer if isinstance(outer, Stopper) else Stopper()
    before = {} if nested else {signum: signal.signal(signum, stopper) for signum in SIGNALS}
    try:
        yield stopper
    except Exception:
        stopper.check()
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
