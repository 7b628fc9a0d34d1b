"""One job at a time: a lease on a folder, held by one process, and free again when that has died, however that came.

A lock of the operating system tells at once where both are on one host, or where the file system has locks between
hosts. Some network file systems have none, or each host its own; so a file beside says who holds the lease, and its
time of change is renewed as long as the holder lives. That time is compared with the file system's own, never with a
host's clock.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from distill.errors import DistillError
from distill.machine.host import host_identity
from distill.storage.files import DamagedFileError, DiskError, read_json, write_json

log = logging.getLogger(__name__)

LOCK, RECORD = "lock", "lease.json"  # in the folder
RENEW_S = 2.0
STALE_S = 20.0  # without a renewal the holder is taken for dead, where nothing else tells
POLL_S = 0.5
DYING_S = 3.0  # for a process that is being killed to let go of its lock


class HeldError(DistillError):
    """Somebody else holds the lease; `holder` says who, in words."""

    def __init__(self, holder: object) -> None:
        super().__init__(f"held by {holder}")
        self.holder = str(holder)


class LostError(DistillError):
    """Another process has taken the lease, because this one gave no heartbeat."""


@dataclass(frozen=True)
class Holder:
    """A process that has taken the lease. `token` is another one each time; `machine` tells hosts, and the process
    numbers of containers on one, apart, `started` processes of one number."""

    token: str
    host: str
    machine: str
    pid: int
    started: int | None
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @staticmethod
    def here() -> Holder:
        now, pid = time.strftime("%Y-%m-%d %H:%M:%S"), os.getpid()
        return Holder(uuid.uuid4().hex, socket.gethostname(), _machine(), pid, _started(pid), now)

    @property
    def alive(self) -> bool | None:
        """Whether the process lives; None where that cannot be seen from here."""
        return _started(self.pid) == self.started if self.machine == _machine() else None


class Lease:
    """The lease on a folder, from now until release() or the end of this process. Raises HeldError."""

    def __init__(self, folder: Path) -> None:
        self._lock, self._record = folder / LOCK, folder / RECORD
        self._holder = Holder.here()
        self._released = threading.Event()
        self._handle = self._locked()
        try:
            self._refuse_living()
            write_json(self._record, asdict(self._holder))
        except BaseException:
            os.close(self._handle)
            raise
        threading.Thread(target=self._renew, name="lease", daemon=True).start()

    @property
    def token(self) -> str:
        """What tells this holding of the lease from every other."""
        return self._holder.token

    def check(self) -> None:
        """Raise LostError where another process has taken the lease."""
        holder = self._read()
        if isinstance(holder, Holder) and holder.token != self.token:
            raise LostError(
                f"{self._record}: taken by {holder}, because this one ({self._holder}) gave no heartbeat for "
                f"{STALE_S:g} s; this one ends, that one goes on"
            )

    def release(self) -> None:
        """Let others have it. The lock's file stays: a lock on one that was removed would hold nobody off."""
        self._released.set()
        with suppress(DistillError, OSError):
            # the record may be another process's by now, and is then not this one's to remove
            self.check()
            self._record.unlink()
        os.close(self._handle)

    def _locked(self) -> int:
        """Return the locked file. POSIX locks: they die with this process, and processes that it forks have no part in
        them; nothing else here may open and close the file, which would end the lock."""
        try:
            handle = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise DiskError(f"cannot write {self._lock}: {error.strerror or error}") from error
        deadline = time.monotonic() + DYING_S
        while True:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return handle
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return handle  # no locks here: the record alone has to do
                if time.monotonic() > deadline:
                    os.close(handle)
                    raise HeldError(self._read() or "another process") from error
            time.sleep(POLL_S)

    def _refuse_living(self) -> None:
        """Raise HeldError where the record's process lives, as far as can be seen; that of another host has STALE_S for
        a heartbeat."""
        holder = self._read()
        if holder is None or (isinstance(holder, Holder) and holder.alive is False):
            return
        if isinstance(holder, Holder) and holder.alive:
            raise HeldError(holder)
        # Both times below are the file system's, which sets them: two hosts' clocks may differ by more than STALE_S.
        os.utime(self._handle)
        if os.fstat(self._handle).st_mtime - self._renewed() > STALE_S:
            return
        log.warning("%s: waiting up to %g s for a heartbeat of %s", self._record, STALE_S, holder)
        before, deadline = self._renewed(), time.monotonic() + STALE_S
        while time.monotonic() < deadline:
            time.sleep(POLL_S)
            if self._read() is None:
                return
            if self._renewed() != before:
                raise HeldError(self._read() or "another process")

    def _read(self) -> Holder | str | None:
        """Return who holds the lease; None where nobody does."""
        try:
            found = read_json(self._record)
            return None if found is None else Holder(**found)
        except (DamagedFileError, TypeError) as error:
            return f"somebody whom {self._record} does not tell ({error})"

    def _renewed(self) -> float:
        """Return the time of the last renewal, 0 where there is no record; opened, because network file systems look
        for changes then."""
        try:
            with self._record.open("rb") as file:
                return os.fstat(file.fileno()).st_mtime
        except OSError:
            return 0.0

    def _renew(self) -> None:
        while not self._released.wait(RENEW_S):
            try:
                self.check()
                os.utime(self._record)
            except LostError as error:
                log.error("%s", error)
                return
            except FileNotFoundError:
                # removed by somebody: without a record a job on another host would find that nobody works here
                with suppress(DiskError):
                    write_json(self._record, asdict(self._holder))
            except OSError as error:
                log.warning("%s: cannot be renewed (%s)", self._record, error.strerror or error)


def _machine() -> str:
    """Return what processes that see one another's numbers have in common."""
    return f"{host_identity()} {os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> int | None:
    """Return when a living process began, in the kernel's ticks; None where there is none of that number."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])
