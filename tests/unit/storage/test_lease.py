"""A lease: who is refused, who takes over, and what a dead or a silent holder leaves behind."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from distill.storage import lease
from distill.storage.files import read_json, write_json
from distill.storage.lease import HeldError, Holder, Lease, LostError

PACKAGE = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("RENEW_S", 0.05), ("STALE_S", 1.0), ("POLL_S", 0.02), ("DYING_S", 0.1)):
        monkeypatch.setattr(lease, name, seconds)


@contextmanager
def holding(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease until it is told to let go, or killed."""
    program = """
        import sys
        from pathlib import Path
        from distill.storage.lease import Lease
        held = Lease(Path(sys.argv[1]))
        print("held", flush=True)
        sys.stdin.readline()
        held.release()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(folder)]
    process = subprocess.Popen(command, cwd=PACKAGE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def elsewhere(folder: Path) -> Holder:
    """A record as a process on another host leaves it."""
    holder = replace(Holder.here(), token="theirs", host="elsewhere", machine="another")
    write_json(folder / lease.RECORD, asdict(holder))
    return holder


@pytest.fixture
def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", refused)


def test_who_comes_second_is_told_who_holds_it(tmp_path: Path) -> None:
    with holding(tmp_path) as process:
        with pytest.raises(HeldError, match=rf"process {process.pid} on {os.uname().nodename}, since 20"):
            Lease(tmp_path)
        process.communicate("let go\n")
    Lease(tmp_path).release()
    assert [path.name for path in tmp_path.iterdir()] == [lease.LOCK]


@pytest.mark.usefixtures("without_locks")
def test_without_locks_a_living_process_of_this_host_holds_others_off(tmp_path: Path) -> None:
    with holding(tmp_path), pytest.raises(HeldError):
        Lease(tmp_path)


@pytest.mark.parametrize("locks", [True, False])
def test_a_killed_holder_is_followed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, locks: bool
) -> None:
    if not locks:
        request.getfixturevalue("without_locks")
    monkeypatch.setattr(lease, "STALE_S", 1000.0)
    with holding(tmp_path) as process:
        process.kill()
        process.wait()
        Lease(tmp_path).release()


def test_a_killed_holder_that_nobody_has_buried_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE_S", 1000.0)
    with holding(tmp_path) as process:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        Lease(tmp_path).release()


def test_a_stopped_holder_is_alive(tmp_path: Path) -> None:
    with holding(tmp_path) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(HeldError):
            Lease(tmp_path)


def test_a_process_that_has_got_a_dead_one_s_number_holds_nothing(tmp_path: Path) -> None:
    holder = Holder.here()
    assert holder.started is not None
    write_json(tmp_path / lease.RECORD, asdict(replace(holder, started=holder.started - 1)))
    Lease(tmp_path).release()


def test_another_host_s_holder_is_waited_for_and_dead_without_a_sign_of_life(tmp_path: Path) -> None:
    elsewhere(tmp_path)
    begun = time.monotonic()
    Lease(tmp_path).release()
    assert time.monotonic() - begun >= 1.0


def test_one_that_has_long_given_no_sign_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE_S", 1000.0)
    elsewhere(tmp_path)
    os.utime(tmp_path / lease.RECORD, (1.0, 1.0))
    Lease(tmp_path).release()


@pytest.mark.parametrize("clock", ["right", "years ahead"])
def test_another_host_s_living_holder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: str) -> None:
    elsewhere(tmp_path)
    monkeypatch.setattr(lease, "STALE_S", 30.0)
    ahead = 1e8 if clock == "years ahead" else 0.0
    sleep = time.sleep

    def renewed_meanwhile(seconds: float) -> None:
        sleep(seconds)
        os.utime(tmp_path / lease.RECORD, (time.time() + ahead, time.time() + ahead))

    monkeypatch.setattr(time, "sleep", renewed_meanwhile)
    with pytest.raises(HeldError, match="on elsewhere, since"):
        Lease(tmp_path)


def test_a_record_that_cannot_be_read_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / lease.RECORD).write_text("{")
    Lease(tmp_path).release()


def test_it_is_renewed_while_it_is_held(tmp_path: Path) -> None:
    held = Lease(tmp_path)
    before, deadline = (tmp_path / lease.RECORD).stat().st_mtime_ns, time.monotonic() + 20
    while (tmp_path / lease.RECORD).stat().st_mtime_ns == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    held.release()


def test_who_has_lost_it_is_told_and_leaves_the_other_s_record(tmp_path: Path) -> None:
    held = Lease(tmp_path)
    held.check()
    elsewhere(tmp_path)
    with pytest.raises(LostError, match=r"lease\.json: taken by process \d+ on elsewhere"):
        held.check()
    held.release()
    assert read_json(tmp_path / lease.RECORD)["token"] == "theirs"


def test_every_holding_has_a_token_of_its_own(tmp_path: Path) -> None:
    tokens = set()
    for _ in range(3):
        held = Lease(tmp_path)
        tokens.add(held.token)
        held.release()
    assert len(tokens) == 3
