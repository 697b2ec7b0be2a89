"""The daemon is killed under busy guests; the service manager brings it back."""

import os
import random
import signal
import socket
import statistics as stats
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.netns import Netns, run_isolated
from tests.system.manager import Manager

KILLS = int(os.environ.get("VBUS_KILLS", "2"))
GUESTS = range(1, 5)
WITHIN_S = 60
CONTINUE_WITHIN_S = 10
"""Generous, as the machine may be busy; what it was is printed."""
CONFIG = """
[[device]]
name = "lan0"
class = "switch"
[[device]]
name = "up0"
class = "switch-tap"
switch = "lan0"
ifname = "vbtest0"
address = "10.99.0.1/24"
""" + "".join(
    f"""
[[bus]]
name = "bus{number}"
[[device]]
name = "e{number}"
class = "echo"
bus = "bus{number}"
[[device]]
name = "v{number}"
class = "venet"
switch = "lan0"
bus = "bus{number}"
[[guest]]
name = "g{number}"
bus = "bus{number}"
"""
    for number in GUESTS
)
BLOCK = bytes(range(256)) * 64
PORT = 7000


class Guest:
    """A busy guest in a network of its own, and a TCP connection from there."""

    def __init__(self, manager: Manager, number: int) -> None:
        self.inside = Netns()
        self.lives = self.answers = self.received = 0
        self.worked = 0.0
        self.wrong = ""
        address = f"10.99.0.{number + 1}"
        words = [str(manager.guest(f"g{number}")), f"e{number}", f"v{number}"]
        with self.inside:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.system.busy", *words, f"{address}/24"],
                stdout=subprocess.PIPE,
                text=True,
            )
        threading.Thread(target=self._listen, daemon=True).start()
        until(lambda: self.lives == 1, self)
        self._connect(address)

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            lives, answers, now = line.split()
            self.answers, self.worked = int(answers), float(now)
            self.lives = int(lives)

    def _connect(self, address: str) -> None:
        with self.inside.socket(socket.SOCK_STREAM) as listener:
            listener.bind((address, PORT))
            listener.listen()
            self.host = socket.create_connection((address, PORT), WITHIN_S)
            self.peer, _ = listener.accept()
        threading.Thread(target=self._send, daemon=True).start()
        threading.Thread(target=self._receive, daemon=True).start()

    def _send(self) -> None:
        """Some MB a second, until it is shut down."""
        try:
            while True:
                self.host.sendall(BLOCK)
                time.sleep(0.005)
        except OSError:
            self.peer.shutdown(socket.SHUT_RDWR)

    def _receive(self) -> None:
        try:
            while part := self.peer.recv(len(BLOCK)):
                at = self.received % len(BLOCK)
                if part != (BLOCK[at:] + BLOCK)[: len(part)]:
                    self.wrong = f"at byte {self.received}"
                self.received += len(part)
        except OSError as error:
            self.wrong = str(error)

    def end(self) -> None:
        self.host.shutdown(socket.SHUT_RDWR)
        self.process.kill()
        self.process.wait()


def until(condition: Callable[[], bool], *guests: Guest) -> float:
    """Wait, and give the seconds it took; guests have to live meanwhile."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < WITHIN_S
        for guest in guests:
            assert guest.process.poll() is None, "the guest has ended"
        time.sleep(0.002)
    return time.monotonic() - began


def held(manager: Manager) -> tuple[int, int]:
    """Descriptors of the daemon, and its mappings of guests' memory."""
    assert manager.process is not None
    proc = Path(f"/proc/{manager.process.pid}")
    maps = (proc / "maps").read_text()
    return len(os.listdir(proc / "fd")), maps.count("memfd:")


@pytest.mark.net
def test_four_busy_guests_go_on_whenever_the_daemon_is_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """R60: calls, rings and TCP; nothing leaks from one daemon to the next."""
    with capsys.disabled():
        run_isolated(lambda: kill_again_and_again(tmp_path))


def kill_again_and_again(folder: Path) -> None:
    ready, work, tcp, holds = [], [], [], []
    with Manager(folder, CONFIG) as manager:
        manager.run()
        guests = [Guest(manager, number) for number in GUESTS]
        try:
            for _ in range(KILLS):
                until(lambda: all(one.received for one in guests), *guests)
                time.sleep(random.uniform(0, 0.2))
                killed = time.monotonic()
                manager.end(signal.SIGKILL)
                lives = sum(one.lives for one in guests) + len(guests)
                sizes = [one.received + len(BLOCK) for one in guests]
                manager.run()
                ready.append(time.monotonic() - killed)
                until(lambda lives=lives: at_work(guests) == lives, *guests)  # type: ignore[misc]
                work.append(max(one.worked for one in guests) - killed)
                until(lambda sizes=sizes: moved(guests, sizes), *guests)  # type: ignore[misc]
                tcp.append(time.monotonic() - killed)
                holds.append(held(manager))
            assert [one.wrong for one in guests] == [""] * len(guests)
        finally:
            for one in guests:
                one.end()
        until(lambda: held(manager)[1] == 0)
        while manager.take():
            pass
        stored = sorted(name.split(".")[0] for name, _ in manager.store)
    print(
        f"\n{KILLS} kills under {len(guests)} guests, median (most) seconds: ready"
        f" {stats.median(ready):.2f} ({max(ready):.2f}), calls and rings"
        f" {stats.median(work):.2f} ({max(work):.2f}), all TCP"
        f" {stats.median(tcp):.2f} ({max(tcp):.2f})"
    )
    assert max(work) < CONTINUE_WITHIN_S
    memory_and_area = 2  # of each guest, and of its venet
    assert {mappings for _, mappings in holds} == {memory_and_area * len(GUESTS)}
    descriptors = [fds for fds, _ in holds]
    assert max(descriptors) - min(descriptors) < KILLS or KILLS < 3, descriptors
    guests_sockets = [f"vbus/guests/g{number}" for number in GUESTS]
    assert stored == ["vbus/control", *guests_sockets, "vbus/state"]


def at_work(guests: list[Guest]) -> int:
    return sum(one.lives for one in guests)


def moved(guests: list[Guest], sizes: list[int]) -> bool:
    return all(one.received > size for one, size in zip(guests, sizes, strict=True))
