"""What a signal to stop does to a program: it passes whoever goes on after failures, and is not lost.

Signals are raised in the main thread: sent to the process, they could reach another thread (of a runtime that some
other test has loaded), and the program after the handler is gone.
"""

from __future__ import annotations

import signal
import threading
from contextlib import nullcontext, suppress

import pytest

from distill.launch.signals import SIGNALS, Stop, stoppable


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_ends_what_goes_on_after_exceptions(signum: signal.Signals) -> None:
    def job() -> None:
        try:
            signal.raise_signal(signum)
        except Exception:
            pytest.fail("a launcher would have gone on with the next job")

    with pytest.raises(Stop) as stop, stoppable():
        job()
    assert (stop.value.code, stop.value.signal) == (128 + signum, signum.name)


def test_a_signal_that_something_swallowed_is_found_again() -> None:
    with stoppable() as stopper:
        stopper.check()
        with pytest.raises(Stop):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stop):
            stopper.check()


def interrupted_import() -> None:
    with suppress(Stop):
        signal.raise_signal(signal.SIGTERM)
    raise ImportError("cannot load module more than once per process")


def test_what_fails_for_being_interrupted_is_a_stop_too() -> None:
    """As an import of NumPy does, which begins anew and then fails in its own words."""
    for nesting in (stoppable, nullcontext):
        with pytest.raises(Stop), nesting(), stoppable():
            interrupted_import()
    with pytest.raises(ImportError), stoppable():
        raise ImportError("of its own")


def test_afterwards_signals_mean_what_they_meant() -> None:
    before = [signal.getsignal(signum) for signum in SIGNALS]
    with stoppable() as outer:
        with stoppable() as inner:
            assert inner is outer
        assert signal.getsignal(signal.SIGTERM) is outer, "the inner one leaves the outer one in place"
    assert [signal.getsignal(signum) for signum in SIGNALS] == before


def test_in_another_thread_nothing_is_installed() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work() -> None:
        with stoppable():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
