"""Two hosts on this one machine: network namespaces joined by a switch, each with its own address, host name and hosts
file, and links that can be slowed. The tests' Slurm runs on them, too. Needs root and iproute2."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

HOSTS = {"hostA": "10.77.0.1", "hostB": "10.77.0.2"}
SWITCH = {"hostS": "10.77.0.254"}


class Hosts:
    """hostA, hostB and the switch hostS. Namespaces carry the folder's name: several such pairs may exist at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on(self, host: str, command: Sequence[str]) -> list[str]:
        """Return the command as it runs on hostA, hostB or hostS: that network, host name and hosts file."""
        enter = f'hostname {host} && mount --bind {self.folder}/hosts /etc/hosts && exec "$@"'
        network = f"--net=/run/netns/{self.namespace(host)}"
        return ["nsenter", network, "unshare", "--uts", "--mount", "sh", "-c", enter, "sh", *command]

    def namespace(self, host: str) -> str:
        return f"{self.folder.name}-{host}"

    def processes(self, host: str) -> list[int]:
        """Return the ids of the processes that run on a host."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace(host)).split()]

    def limit(self, gbit: float) -> None:
        """Let a host send so many Gbit/s at most. A veth carries packets of 64 KiB: a smaller burst passes none."""
        burst = max(256 * 1024, round(gbit * 1e9 / 8 * 1e-3))
        for host in HOSTS:
            limit = ["rate", f"{gbit * 1e3:g}mbit", "burst", str(burst), "latency", "100ms"]
            _run("tc", "-n", self.namespace(host), "qdisc", "replace", "dev", "eth0", "root", "tbf", *limit)


@contextmanager
def joined(hosts: Hosts) -> Iterator[None]:
    """Make the namespaces and plug every host into the switch's bridge; afterwards remove all, with what runs there."""
    lines = [f"{address} {host}" for host, address in {"localhost": "127.0.0.1", **HOSTS, **SWITCH}.items()]
    (hosts.folder / "hosts").write_text("\n".join(lines) + "\n")
    switch = hosts.namespace("hostS")
    with ExitStack() as stack:
        for host in (*SWITCH, *HOSTS):
            _ip("netns", "add", hosts.namespace(host))
            stack.callback(_remove_namespace, hosts, host)
            _ip("-n", hosts.namespace(host), "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "addr", "add", f"{SWITCH['hostS']}/24", "dev", "br0")
        _ip("-n", switch, "link", "set", "br0", "up")
        for host, address in HOSTS.items():
            inside, port = hosts.namespace(host), f"port{host[-1]}"
            _ip("link", "add", "eth0", "netns", inside, "type", "veth", "peer", "name", port, "netns", switch)
            _ip("-n", inside, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", inside, "link", "set", "eth0", "up")
            _ip("-n", switch, "link", "set", port, "master", "br0", "up")
        yield


def _remove_namespace(hosts: Hosts, host: str) -> None:
    """Remove a namespace and kill what still runs in it: only what was started there can."""
    for pid in hosts.processes(host):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _ip("netns", "del", hosts.namespace(host))


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"
    return result.stdout
