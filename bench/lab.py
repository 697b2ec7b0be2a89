"""Network namespaces and what pushes traffic between them.

Everything happens in namespaces that end with the process that made them: the worker
runs in a network and a process namespace of its own (`enter`), the guests' namespaces
hang below it. Nothing reaches the machine's own network.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.processes import Skipped, c_tool, output

HUB_ADDRESS = "10.77.0.1"
PREFIX = 24
_PORT = "7007"
_MS = 600
_PINGS = 2000
_READY_S = 10


def enter(module: str, *arguments: str) -> list[str]:
    """Give the command that runs a module of this folder in namespaces of its own."""
    if shutil.which("ip") is None:
        raise Skipped("needs ip: apt-get install iproute2")
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        raise Skipped("needs /dev/net/tun")
    unshare = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0:
        unshare.append("--map-root-user")
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        raise Skipped("may not make network namespaces: run as root")
    return [*unshare, sys.executable, "-m", f"bench.{module}", *arguments]


def ip(words: str) -> None:
    """Run `ip` in the hub's namespace."""
    subprocess.run(["ip", *words.split()], check=True)


@dataclass
class Place:
    """A network namespace: the hub's (no holder) or a guest's, with its address."""

    address: str
    holder: subprocess.Popen[Any] | None = None

    @classmethod
    def hub(cls) -> "Place":
        ip("link set lo up")
        return cls(HUB_ADDRESS)

    @classmethod
    def guest(cls, nth: int) -> "Place":
        """Make the namespace of guest 1, 2, ..."""
        holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
        place = cls(f"10.77.0.{1 + nth}", holder)
        _until(lambda: _namespace(holder.pid) != _namespace(os.getpid()))
        place.run("ip", "link", "set", "lo", "up")
        return place

    @property
    def pid(self) -> int:
        return self.holder.pid if self.holder else os.getpid()

    def command(self, *command: str | Path) -> list[str]:
        """Give the command that runs this one in the namespace."""
        words = [str(word) for word in command]
        if self.holder is None:
            return words
        return ["nsenter", "--target", str(self.pid), "--net", *words]

    def run(self, *command: str | Path) -> str:
        return output(*self.command(*command))

    def up(self, interface: str) -> None:
        """Give an interface that is here the place's address."""
        self.run("ip", "addr", "add", f"{self.address}/{PREFIX}", "dev", interface)
        self.run("ip", "link", "set", interface, "up")

    def take(self, interface: str) -> None:
        """Move an interface from the hub to here, and set it up."""
        ip(f"link set {interface} netns {self.pid}")
        self.up(interface)


def _namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def _until(condition: Any, what: str = "a namespace") -> None:
    end = time.monotonic() + _READY_S
    while not condition():
        if time.monotonic() > end:
            raise Skipped(f"waited too long for {what}")
        time.sleep(0.01)


def wait_reachable(place: Place, to: Place) -> None:
    """Return once a ping goes through."""
    ping = place.command(c_tool("traffic.c"), "ping", to.address, "1")

    def reached() -> bool:
        return subprocess.run(ping, capture_output=True).returncode == 0

    _until(reached, f"{to.address} to answer")


def _push(source: Place, sink: Place, kind: str, extra: Sequence[str]) -> float:
    tool = c_tool("traffic.c")
    end = subprocess.Popen(
        sink.command(tool, f"{kind}-sink", _PORT), stdout=subprocess.PIPE, text=True
    )
    assert end.stdout is not None
    with end, end.stdout:
        end.stdout.readline()
        source.run(tool, f"{kind}-source", sink.address, _PORT, *extra)
        return float(end.stdout.readline())


def tcp_gbit_s(source: Place, sink: Place, milliseconds: int = _MS) -> float:
    return _push(source, sink, "tcp", [str(milliseconds)]) / 1e9


def udp_kpps(
    source: Place, sink: Place, size: int = 64, milliseconds: int = _MS
) -> float:
    """Thousands of datagrams a second that arrived."""
    return _push(source, sink, "udp", [str(size), str(milliseconds)]) / 1e3


def ping_us(source: Place, sink: Place, count: int = _PINGS) -> float:
    """The median round trip."""
    said = source.run(c_tool("traffic.c"), "ping", sink.address, str(count))
    return float(said.split()[0]) / 1e3


def measure(hub: Place, first: Place, second: Place) -> dict[str, float]:
    """All figures of one switch that connects these three."""
    wait_reachable(first, hub)
    wait_reachable(second, first)
    return {
        "ping": ping_us(first, hub),
        "udp": udp_kpps(first, second),
        "tcp_host": tcp_gbit_s(first, hub),
        "tcp_guest": tcp_gbit_s(first, second),
    }
