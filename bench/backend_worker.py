"""Measures a switch and its venets in the daemon and in a backend, by turns.

Both are set up at once, in namespaces of their own (`enter("backend_worker")`), and
what is not measured sleeps. Each figure is taken from one and then from the other, many
times in short windows, so that whatever else the machine does meets both alike. Prints
the median of each figure.

Nothing is pinned: with two cores, and with a guest, a source and a sink for each end,
more processes than cores want to run, and which of them share one is for the scheduler.
"""

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Self

from bench.daemon import Daemon, GuestProcess, guest_command
from bench.lab import Place, ping_us, tcp_gbit_s, udp_kpps, wait_reachable
from bench.processes import report

_TURNS = 3
_MS = 300
_CALLS_MS = 600
"""Longer than a push with what it takes to start."""
_PINGS = 300
_CONFIG = """
[[device]]
name = "lan0"
class = "switch"
[[device]]
name = "uplink0"
class = "switch-tap"
switch = "lan0"
ifname = "{kind}"
address = "{hub}/24"
[[bus]]
name = "calls"
[[device]]
name = "echo0"
class = "echo"
bus = "calls"
[[guest]]
name = "caller"
bus = "calls"
[[bus]]
name = "frames"
[[device]]
name = "source"
class = "venet"
bus = "frames"
switch = "lan0"
[[device]]
name = "sink"
class = "venet"
bus = "frames"
switch = "lan0"
[[guest]]
name = "frames"
bus = "frames"
"""
_BACKEND = """
[[backend]]
name = "net"
classes = ["switch", "switch-tap", "venet"]
"""
_GUEST = """
[[bus]]
name = "{name}"
[[device]]
name = "lan0-{name}"
class = "venet"
bus = "{name}"
switch = "lan0"
[[guest]]
name = "{name}"
bus = "{name}"
"""
_GUESTS = ("g1", "g2")


class Pusher:
    """A guest that does something for a while when told to. A context manager."""

    def __init__(self, module: str, *words: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"bench.{module}", *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._line()

    def start(self, milliseconds: int) -> None:
        """Let it begin."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{milliseconds}\n")
        self._process.stdin.flush()

    def result(self, name: str) -> float:
        """Wait for the end, and give one of the numbers that it says."""
        return float(json.loads(self._line())[name])

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


class Site:
    """A daemon, the host's end of its switch, and two guests on it."""

    def __init__(self, stack: contextlib.ExitStack, kind: str, number: int) -> None:
        net = f"10.77.{number}"
        self.hub = Place(f"{net}.1")
        config = _CONFIG.format(kind=kind, hub=self.hub.address)
        config += _BACKEND if kind == "backend" else ""
        config += "".join(_GUEST.format(name=name) for name in _GUESTS)
        daemon = stack.enter_context(Daemon(config))
        self.guests: list[Place] = []
        for nth, name in enumerate(_GUESTS, 2):
            place = Place(f"{net}.{nth}", Place.guest(nth).holder)
            address = f"lan0-{name}={place.address}/24"
            command = guest_command(daemon.socket(name), "--address", address)
            stack.enter_context(GuestProcess(place.command(*command)))
            self.guests.append(place)
        self.caller = stack.enter_context(
            Pusher("caller_worker", daemon.socket("caller"), "echo0")
        )
        self.frames = stack.enter_context(
            Pusher("frames_worker", daemon.socket("frames"), "source", "sink")
        )
        self._pids = [daemon.pid]
        if kind == "backend":
            (shown,) = daemon.ask("backend", "show", "net")
            self._pids.append(shown["pid"])
        for place in self.guests:
            wait_reachable(place, self.hub)

    def cpu_s(self) -> float:
        """CPU time of the daemon, and of the backend where there is one."""
        texts = (Path(f"/proc/{pid}/schedstat").read_text() for pid in self._pids)
        return sum(int(text.split()[0]) for text in texts) / 1e9

    def tcp_host(self) -> dict[str, float]:
        return {"tcp_host": tcp_gbit_s(self.guests[0], self.hub, _MS)}

    def tcp_guest(self) -> dict[str, float]:
        before = self.cpu_s()
        rate = tcp_gbit_s(self.guests[0], self.guests[1], _MS)
        gigabytes = rate * _MS / 1000 / 8
        return {
            "tcp_guest": rate,
            "tcp_cpu": (self.cpu_s() - before) * 1000 / gigabytes,
        }

    def tcp_busy(self) -> dict[str, float]:
        """TCP between guests while another guest calls the daemon without a pause."""
        self.caller.start(_CALLS_MS)
        rate = tcp_gbit_s(self.guests[0], self.guests[1], _MS)
        return {"tcp_busy": rate, "tcp_busy_call": self.caller.result("p50")}

    def raw(self) -> dict[str, float]:
        """Frames of one guest between two of its venets."""
        self.frames.start(_MS)
        return {"raw": self.frames.result("kpps")}

    def raw_busy(self) -> dict[str, float]:
        """The same while another guest calls the daemon without a pause."""
        self.caller.start(_MS)
        self.frames.start(_MS)
        rate = self.frames.result("kpps")
        return {"raw_busy": rate, "raw_busy_call": self.caller.result("p50")}

    def udp(self) -> dict[str, float]:
        return {"udp": udp_kpps(self.guests[0], self.guests[1], milliseconds=_MS)}

    def ping(self) -> dict[str, float]:
        return {"ping": ping_us(self.guests[0], self.hub, _PINGS)}


_FIGURES: tuple[Callable[[Site], dict[str, float]], ...] = (
    Site.tcp_host,
    Site.tcp_guest,
    Site.tcp_busy,
    Site.udp,
    Site.ping,
    Site.raw,
    Site.raw_busy,
)


def main() -> None:
    Place.hub()
    taken: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        sites = {
            kind: Site(stack, kind, number)
            for number, kind in enumerate(("vbus", "backend"), 1)
        }
        for turn in range(_TURNS):
            order = list(sites.items())[:: 1 if turn % 2 else -1]
            for figure in _FIGURES:
                for kind, site in order:
                    for name, value in figure(site).items():
                        taken.setdefault(f"{kind}_{name}", []).append(value)
    report({name: statistics.median(values) for name, values in taken.items()})


if __name__ == "__main__":
    main()
